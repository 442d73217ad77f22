import { closeSync, fsyncSync, openSync, renameSync, rmSync, writeSync } from 'node:fs';
import { dirname } from 'node:path';
import { TplaError } from '../errors.js';
import { DTYPE_BYTES } from './safetensors.js';

export interface TensorHeader {
  name: string;
  dtype: string;
  shape: number[];
}

/**
 * Writes one safetensors file in the order its headers were given, never holding more than what one `write` brings.
 * The bytes go to `PATH.partial`; only `finish()` gives the file its name, after they are on disk, so that a file under its
 * own name is always whole.
 */
export class SafetensorsWriter {
  readonly #path: string;
  readonly #tensors: TensorHeader[];
  readonly #fd: number;
  readonly #partial: string;
  readonly #sizes: number[];
  #open = true;
  #current = 0;
  #written = 0;

  constructor(path: string, tensors: TensorHeader[], metadata: Record<string, string> = {}) {
    this.#path = path;
    this.#tensors = tensors;
    this.#partial = `${path}.partial`;
    this.#sizes = tensors.map(({ dtype, shape }) => shape.reduce((product, size) => product * size, DTYPE_BYTES[dtype]!));
    this.#fd = attemptWrite(path, () => openSync(this.#partial, 'w'));
    try {
      this.#append(encodeHeader(tensors, this.#sizes, metadata));
    } catch (error) {
      this.abort();
      throw error;
    }
  }

  /** Appends bytes to the current tensor, or starts the next one; they may come in pieces, in header order. */
  write(name: string, bytes: Uint8Array): void {
    while (this.#current < this.#tensors.length && this.#written === this.#sizes[this.#current]) this.#next();
    const expected = this.#tensors[this.#current]?.name;
    if (expected !== name || this.#written + bytes.length > this.#sizes[this.#current]!) {
      throw new TplaError('INTERNAL', `${this.#path}: wrote ${bytes.length} bytes of ${name} at byte ${this.#written} of ${expected}`);
    }
    this.#append(bytes);
    this.#written += bytes.length;
  }

  finish(): void {
    while (this.#current < this.#tensors.length && this.#written === this.#sizes[this.#current]) this.#next();
    if (this.#current < this.#tensors.length) throw new TplaError('INTERNAL', `${this.#path}: tensor ${this.#tensors[this.#current]!.name} is not complete`);
    attemptWrite(this.#path, () => {
      fsyncSync(this.#fd);
      closeSync(this.#fd);
      this.#open = false;
      renameSync(this.#partial, this.#path);
      syncDirectory(dirname(this.#path));
    });
  }

  /** Gives up: nothing of the file stays behind. */
  abort(): void {
    if (this.#open) closeSync(this.#fd);
    this.#open = false;
    rmSync(this.#partial, { force: true });
  }

  #next(): void {
    this.#current++;
    this.#written = 0;
  }

  #append(bytes: Uint8Array): void {
    attemptWrite(this.#path, () => {
      for (let at = 0; at < bytes.length; ) at += writeSync(this.#fd, bytes, at, bytes.length - at);
    });
  }
}

/** A whole small file at once. */
export function writeSafetensors(path: string, tensors: (TensorHeader & { data: Uint8Array })[], metadata: Record<string, string> = {}): void {
  const writer = new SafetensorsWriter(path, tensors, metadata);
  try {
    for (const { name, data } of tensors) writer.write(name, data);
    writer.finish();
  } catch (error) {
    writer.abort();
    throw error;
  }
}

/** Length prefix and JSON, padded with spaces so that the data begins at a multiple of 64 bytes. */
function encodeHeader(tensors: TensorHeader[], sizes: number[], metadata: Record<string, string>): Buffer {
  const header: Record<string, unknown> = { __metadata__: { format: 'pt', ...metadata } };
  let at = 0;
  tensors.forEach(({ name, dtype, shape }, i) => {
    header[name] = { dtype, shape, data_offsets: [at, at + sizes[i]!] };
    at += sizes[i]!;
  });
  const json = Buffer.from(JSON.stringify(header));
  const padded = Math.ceil((8 + json.length) / 64) * 64 - 8;
  const bytes = Buffer.alloc(8 + padded, ' ');
  bytes.writeBigUInt64LE(BigInt(padded), 0);
  json.copy(bytes, 8);
  return bytes;
}

function syncDirectory(dir: string): void {
  const fd = openSync(dir, 'r');
  fsyncSync(fd);
  closeSync(fd);
}

/** Runs file operations; a failure becomes IO_FAILED with a reason a person can act on. */
export function attemptWrite<T>(path: string, io: () => T): T {
  try {
    return io();
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code;
    const reason = code === 'ENOSPC' ? 'the disk is full' : code === 'EDQUOT' ? 'the disk quota is used up' : (error as Error).message;
    throw new TplaError('IO_FAILED', `${path} cannot be written: ${reason}`, { cause: error });
  }
}
