import { readFileSync, writeFileSync } from 'node:fs';
import { Flags } from '@oclif/core';
import { parseCsv, rowOfRecord } from '../bench/attention/csv.js';
import { PRESETS, type PresetName } from '../bench/attention/presets.js';
import { rooflineSvg } from '../bench/attention/roofline.js';
import { rowKey, type BenchRow } from '../bench/attention/rows.js';
import { benchRows, RESULT_HEAD, resultCells, toCsv, type BenchResult } from '../bench/attention/run.js';
import { BaseCommand } from '../cli/base_command.js';
import { TplaError } from '../errors.js';
import type { KernelPath, MachineRates } from '../native/attention.js';
import { native } from '../native/loader.js';
import { table } from '../report/table.js';

const SHAPE_FLAGS = ['heads', 'kv-len'] as const;

export default class BenchAttention extends BaseCommand {
  static override summary = 'Check the attention kernels on this GPU against float64, then time them';
  static override description = `Shapes come from a preset, a CSV file or flags. Every row is first compared with a float64 reference on random data, with NaN in all memory
that must not be read; a row that is wrong ends the run. Times are medians of graph replays over buffers that rotate beyond L2, scheduling and
reduction included. --anchors puts somebody else's times beside them (columns batch, heads, kv_len or kv_lens, ms, and if wanted gpu, latent, q_tokens).`;
  static override examples = [
    '<%= config.bin %> <%= command.id %> --preset flashmla --anchors flashmla.csv',
    '<%= config.bin %> <%= command.id %> --preset tpla --csv tpla.csv --svg roofline.svg',
    '<%= config.bin %> <%= command.id %> --latent 256 --batch 32 --heads 64 --kv-len 32768 --json',
  ];
  static override enableJsonFlag = true;
  static override flags = {
    preset: Flags.string({ options: Object.keys(PRESETS), multiple: true, description: 'named set of shapes; may be given more than once' }),
    file: Flags.string({ description: 'CSV of shapes: columns heads, batch, kv_len or kv_lens (a;b;…), and if wanted latent, q_tokens, page_size' }),
    latent: Flags.integer({ default: 512, description: 'latent width of a single decode shape' }),
    batch: Flags.integer({ min: 1, description: 'sequences; default 1, or as many as --kv-len lists' }),
    heads: Flags.integer({ min: 1, description: 'query heads' }),
    'kv-len': Flags.string({ description: 'cached tokens, one number or a;b;… for uneven lengths' }),
    'q-tokens': Flags.integer({ min: 1, default: 1, description: 'query tokens per sequence' }),
    'page-size': Flags.integer({ default: 64, description: 'tokens of a page, a multiple of 16' }),
    path: Flags.string({ options: ['auto', 'sm90', 'sm80'], default: 'auto', description: 'decode implementation' }),
    anchors: Flags.string({ description: "CSV of somebody else's times" }),
    repeats: Flags.integer({ min: 1, default: 3, description: 'runs of each check, which must agree to the bit' }),
    seed: Flags.integer({ min: 0, default: 1, description: 'of the random data' }),
    csv: Flags.string({ description: 'write the results to this file' }),
    svg: Flags.string({ description: 'write a roofline plot to this file' }),
  };

  async run(): Promise<{ machine: MachineRates; results: BenchResult[] }> {
    const { flags } = await this.parse(BenchAttention);
    const rows = this.rows(flags);
    const addon = native();
    const gpu = addon.probe().cuda;
    if (gpu.devices.length === 0) throw new TplaError('GPU_UNAVAILABLE', `bench-attention needs an NVIDIA GPU of compute capability 8.0 or newer: ${gpu.reason ?? 'none was found'}`);
    const others = flags.anchors === undefined ? new Map<string, number>() : readAnchors(flags.anchors, gpu.devices[0]!.name);
    const found = await benchRows(addon, rows, {
      path: flags.path as KernelPath, seed: flags.seed, repeats: flags.repeats, others,
      onResult: (result) => { if (!this.jsonEnabled()) process.stderr.write(`${resultCells(result).join('  ')}\n`); },
    });
    this.log(`${found.machine.name}: copy ${(found.machine.copyBytesPerSecond / 1e9).toFixed(0)} GB/s, bf16 matrix product ${(found.machine.matrixFlopsPerSecond / 1e12).toFixed(0)} TFLOP/s`);
    this.log(table(RESULT_HEAD, found.results.map(resultCells), ['left', ...RESULT_HEAD.slice(1).map(() => 'right' as const)]));
    if (flags.csv !== undefined) writeFileSync(flags.csv, toCsv(found.results));
    if (flags.svg !== undefined) writeFileSync(flags.svg, rooflineSvg(found.machine, found.results));
    return found;
  }

  private rows(flags: { preset?: string[]; file?: string; latent: number; batch?: number; heads?: number; 'kv-len'?: string; 'q-tokens': number; 'page-size': number }): BenchRow[] {
    const rows: BenchRow[] = (flags.preset ?? []).flatMap((name) => PRESETS[name as PresetName]);
    if (flags.file !== undefined) rows.push(...parseCsv(readText(flags.file)).map(rowOfRecord));
    if (SHAPE_FLAGS.some((name) => flags[name] !== undefined)) {
      const missing = SHAPE_FLAGS.filter((name) => flags[name] === undefined);
      if (missing.length > 0) throw new TplaError('USAGE', `a single shape needs ${missing.map((name) => `--${name}`).join(' and ')} as well`);
      const lens = flags['kv-len']!;
      const uneven = lens.includes(';');
      rows.push(rowOfRecord({
        latent: String(flags.latent), heads: String(flags.heads), q_tokens: String(flags['q-tokens']), page_size: String(flags['page-size']),
        batch: flags.batch === undefined ? (uneven ? '' : '1') : String(flags.batch), kv_len: uneven ? '' : lens, kv_lens: uneven ? lens : '',
      }));
    }
    if (rows.length === 0) throw new TplaError('USAGE', 'nothing to run: give --preset, --file, or --heads and --kv-len');
    return rows;
  }
}

function readText(file: string): string {
  try {
    return readFileSync(file, 'utf8');
  } catch (cause) {
    throw new TplaError('USAGE', `${file}: ${(cause as Error).message}`, { cause });
  }
}

/** Times by row, of the rows measured on this GPU (`gpu` is part of its name) or on an unnamed one. */
function readAnchors(file: string, gpu: string): Map<string, number> {
  const rows = parseCsv(readText(file)).map(rowOfRecord);
  return new Map(rows.filter((row) => row.ms !== null && gpu.includes(row.gpu)).map((row) => [rowKey(row), row.ms!]));
}
