import type { Logger } from 'pino';
import { serviceManager } from '../config/env.js';
import { native } from '../native/loader.js';

/** Tells systemd (Type=notify) how the process is; every call does nothing where no service manager listens. */
export interface ServiceManagerLink {
  /** Ready to serve; starts the watchdog's heartbeat. */
  ready(status: string): void;
  stopping(): void;
  close(): void;
}

/** A heartbeat comes from the event loop, so one that hangs is noticed. */
const HEARTBEATS_PER_WATCHDOG = 3;

export function connectServiceManager(log: Logger): ServiceManagerLink {
  const { socket, watchdogMs } = serviceManager();
  if (socket === null) return { ready() {}, stopping() {}, close() {} };
  const notify = (state: string) => {
    try {
      native().notifyServiceManager(socket, state);
    } catch (error) {
      log.warn({ err: error }, 'cannot notify the service manager');
    }
  };
  let heartbeat: NodeJS.Timeout | undefined;
  return {
    ready(status) {
      notify(`READY=1\nSTATUS=${status}`);
      if (watchdogMs !== null) heartbeat = setInterval(() => notify('WATCHDOG=1'), watchdogMs / HEARTBEATS_PER_WATCHDOG);
    },
    stopping() { notify('STOPPING=1\nSTATUS=draining'); },
    close() { clearInterval(heartbeat); },
  };
}
