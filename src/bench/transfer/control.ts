/** Requests and answers between the two ends of a benchmark, one JSON text a message; descriptors may come with an answer. */
import { closeSync } from 'node:fs';
import { TplaError, toTplaError, ERRORS, type ErrorCode } from '../../errors.js';
import { parseAddress } from '../../http/address.js';
import { removeStaleSocket } from '../../http/server.js';
import { native } from '../../native/loader.js';
import type { Channel, ChannelServer, KvDType, KvLayout, TimelineMark } from '../../native/types.js';
import type { HandoffDirection, HandoffTicket } from '../../transfer/types.js';

export type Request =
  /** A new arena and receiver; what was set up before goes. The answer carries the arena's descriptors where the control socket can. */
  | { op: 'setup'; path: string; direction: HandoffDirection; target: KvLayout; pages: number }
  | { op: 'open'; request: number; tokens: number; seed: number }
  | { op: 'verify'; request: number; tokens: number; seed: number; sourceDType: KvDType }
  | { op: 'sink' }
  /** Of the request's hand-off that was opened last, once it is accepted. */
  | { op: 'accepted'; request: number }
  | { op: 'timeline'; keep: boolean };

export interface Answers {
  setup: { address: string; handles: string[] };
  open: { ticket: HandoffTicket };
  verify: { difference: string | null };
  sink: { port: number };
  /** By monotonicUs() of that process. */
  accepted: { at: number };
  timeline: { marks: TimelineMark[] };
}

interface Failure { error: { code: string; message: string } }

interface Waiting {
  resolve(answer: unknown, fds: number[]): void;
  reject(error: TplaError): void;
}

/** The driving end. */
export class Control {
  readonly #channel: Channel;
  readonly #waiting: Waiting[];
  /** One monotonic clock for both ends. */
  readonly isSameHost: boolean;

  private constructor(channel: Channel, waiting: Waiting[], isSameHost: boolean) {
    this.isSameHost = isSameHost;
    this.#channel = channel;
    this.#waiting = waiting;
  }

  static async connect(address: string): Promise<Control> {
    const target = parseAddress(address);
    const waiting: Waiting[] = [];
    const channel = await native().connectChannel(target.kind === 'unix' ? target.path : target, {
      onMessage: (_channel, bytes, fds) => {
        const next = waiting.shift();
        const answer = JSON.parse(Buffer.from(bytes).toString()) as Failure | object;
        if (!next) fds.forEach((fd) => closeSync(fd));
        else if ('error' in answer) next.reject(new TplaError(codeOf(answer.error.code), answer.error.message));
        else next.resolve(answer, fds);
      },
      onClose: (_channel, reason) => {
        for (const { reject } of waiting.splice(0)) reject(new TplaError('WORKER_FAILED', `the other end of the benchmark is gone: ${reason}`));
      },
    });
    return new Control(channel, waiting, target.kind === 'unix');
  }

  /** Answers come in the order of requests. The caller closes the descriptors. */
  ask<R extends Request>(request: R): Promise<{ answer: Answers[R['op']]; fds: number[] }> {
    return new Promise((resolve, reject) => {
      this.#waiting.push({ resolve: (answer, fds) => resolve({ answer: answer as Answers[R['op']], fds }), reject });
      this.#channel.send(Buffer.from(JSON.stringify(request)));
    });
  }

  close(): void {
    this.#channel.close();
  }
}

const codeOf = (text: string): ErrorCode => (Object.hasOwn(ERRORS, text) ? text as ErrorCode : 'INTERNAL');

/** The answering end, one driver at a time. `handle` answers a request; `leave` clears up after a driver. */
export async function serveControl(address: string, handlers: {
  handle(request: Request): Promise<{ answer: object; fds?: number[] }>;
  leave(): Promise<void>;
}): Promise<ChannelServer> {
  const target = parseAddress(address);
  if (target.kind === 'unix') await removeStaleSocket(target.path);
  let driver: Channel | null = null;
  let queue = Promise.resolve();
  const answer = async (channel: Channel, bytes: Uint8Array) => {
    try {
      const { answer: value, fds } = await handlers.handle(JSON.parse(Buffer.from(bytes).toString()) as Request);
      channel.send(Buffer.from(JSON.stringify(value)), target.kind === 'unix' ? fds ?? [] : []);
    } catch (thrown) {
      const { code, message } = toTplaError(thrown);
      try {
        channel.send(Buffer.from(JSON.stringify({ error: { code, message } } satisfies Failure)));
      } catch { /* the driver is gone: onClose follows */ }
    }
  };
  return native().listenChannel(target.kind === 'unix' ? target.path : target, (channel) => {
    if (driver) channel.close();
    else driver = channel;
  }, {
    onMessage: (channel, bytes, fds) => {
      fds.forEach((fd) => closeSync(fd));
      if (channel === driver) queue = queue.then(() => answer(channel, bytes));
    },
    onClose: (channel) => {
      if (channel !== driver) return;
      queue = queue.then(() => handlers.leave()).then(() => { driver = null; });
    },
  });
}
