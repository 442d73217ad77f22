import { destination, pino, stdTimeFunctions, type Logger } from 'pino';
import type { LogLevel } from './config/types.js';

/** Structured JSON lines on stderr; stdout belongs to a command's result. */
export function createLogger(role: string, id: string, level: LogLevel): Logger {
  return pino({ level, base: { role, id, pid: process.pid }, timestamp: stdTimeFunctions.isoTime }, destination({ dest: 2, sync: true }));
}
