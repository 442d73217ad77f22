import { closeSync, openSync, readSync } from 'node:fs';
import { TplaError } from '../errors.js';
import type { SafetensorsFile } from '../model/safetensors.js';

/** The bytes of one tensor of a small file, in a buffer of their own. */
export function readTensor(file: SafetensorsFile, name: string): ArrayBuffer {
  const entry = file.tensors.find((tensor) => tensor.name === name);
  if (entry === undefined) throw new TplaError('CHECKPOINT_INVALID', `${file.path} has no tensor ${name}`);
  const bytes = new Uint8Array(entry.end - entry.begin);
  const fd = openSync(file.path, 'r');
  try {
    for (let at = 0; at < bytes.length; ) {
      const count = readSync(fd, bytes, at, bytes.length - at, entry.begin + at);
      if (count === 0) throw new TplaError('CHECKPOINT_INVALID', `${file.path} ended inside tensor ${name}`);
      at += count;
    }
  } finally {
    closeSync(fd);
  }
  return bytes.buffer;
}
