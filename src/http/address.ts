import { TplaError } from '../errors.js';

export type Address = { kind: 'unix'; path: string } | { kind: 'tcp'; host: string; port: number };

/** Longest path that fits sockaddr_un.sun_path with its terminating NUL. */
const MAX_SOCKET_PATH = 107;

/** Reads `unix:/path.sock` or `tcp://host:port`. Throws USAGE naming the text otherwise. */
export function parseAddress(text: string): Address {
  if (text.startsWith('unix:')) {
    const path = text.slice('unix:'.length);
    if (path === '') throw new TplaError('USAGE', `address "${text}" has no path; write unix:/run/tpla/NAME.sock`);
    if (Buffer.byteLength(path) > MAX_SOCKET_PATH) {
      throw new TplaError('USAGE', `socket path is ${Buffer.byteLength(path)} bytes, the kernel takes ${MAX_SOCKET_PATH}: ${path}; choose a shorter directory`);
    }
    return { kind: 'unix', path };
  }
  const match = /^(?:tcp|http):\/\/(\[[0-9a-fA-F:]+\]|[^:/]+):(\d{1,5})\/?$/.exec(text);
  const port = match ? Number(match[2]) : NaN;
  if (!match || !(port <= 65535)) {
    throw new TplaError('USAGE', `address "${text}" is neither unix:/path nor tcp://host:port`);
  }
  return { kind: 'tcp', host: match[1]!.replace(/^\[|\]$/g, ''), port };
}

export function formatAddress(address: Address): string {
  if (address.kind === 'unix') return `unix:${address.path}`;
  const host = address.host.includes(':') ? `[${address.host}]` : address.host;
  return `tcp://${host}:${address.port}`;
}
