import { copyFileSync, existsSync, mkdirSync, symlinkSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import type { Checkpoint } from '../model/checkpoint.js';
import { readSafetensors } from '../model/safetensors.js';
import { writeSafetensors } from '../model/safetensors_writer.js';
import type { StoredTensor } from './layer_tensors.js';

/**
 * A checkpoint that is another one but for some tensors: links to its shards beside one file a layer with what is different. Costs the
 * changed tensors only, so methods can be compared on checkpoints of any size. For this machine and this run, not for shipping.
 */
export class Overlay {
  readonly dir: string;
  readonly #source: Checkpoint;
  readonly #weightMap: Record<string, string> = {};

  constructor(source: Checkpoint, dir: string) {
    this.#source = source;
    this.dir = dir;
    mkdirSync(dir, { recursive: true });
    for (const { path, tensors } of source.shards) {
      symlinkSync(path, join(dir, basename(path)));
      for (const { name } of tensors) this.#weightMap[name] = basename(path);
    }
    for (const file of ['tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json']) {
      if (existsSync(join(source.dir, file))) copyFileSync(join(source.dir, file), join(dir, file));
    }
  }

  addLayer(layer: number, tensors: StoredTensor[]): void {
    const file = `overlay-${layer}.safetensors`;
    writeSafetensors(join(this.dir, file), tensors);
    for (const { name } of tensors) this.#weightMap[name] = file;
  }

  /** The same from a file that stays where it is. */
  linkLayer(path: string): void {
    symlinkSync(path, join(this.dir, basename(path)));
    for (const { name } of readSafetensors(path).tensors) this.#weightMap[name] = basename(path);
  }

  finish(tpla: object): void {
    writeFileSync(join(this.dir, 'model.safetensors.index.json'), JSON.stringify({ weight_map: this.#weightMap }));
    writeFileSync(join(this.dir, 'config.json'), JSON.stringify({ ...this.#source.config, tpla }));
  }
}
