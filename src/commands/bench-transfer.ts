import { writeFileSync } from 'node:fs';
import { Flags } from '@oclif/core';
import { expand, MODELS, type BenchCase, type KvShape, type ModelName } from '../bench/transfer/cases.js';
import { collationCases, collationTable } from '../bench/transfer/collation.js';
import { benchTransfer, benchTransferBesidePrefill, serveBench, type BenchOptions } from '../bench/transfer/command.js';
import { overlapTable, type OverlapRow } from '../bench/transfer/overlap.js';
import { availablePaths, BENCH_PATHS } from '../bench/transfer/paths.js';
import { plotOf, tableOf, toCsv, type BenchRow } from '../bench/transfer/rows.js';
import { timelineTable } from '../bench/transfer/timeline.js';
import { BaseCommand } from '../cli/base_command.js';
import { TplaError } from '../errors.js';
import { createLogger } from '../log.js';
import { PATHS, type TransferPath } from '../transfer/types.js';

export default class BenchTransfer extends BaseCommand {
  static override summary = 'Measure KV hand-offs between two processes, verified';
  static override description = `Each row is real hand-offs of one request at a time: pages reserved, every layer pushed, resharded and converted into decode's pages,
checksums verified, accepted. GB/s counts bytes in place over the median time until the last is there; latencies run from the first push to
decode's word that all is accepted. The row before it is the plain copy that "of one copy" compares with: the same bytes between the same two
processes with nothing done to them (memcpy, one GPU copy, or raw sockets), its runs between those of the hand-off. Lists (a,b,c) are swept in
every combination. GB is 1e9 bytes.

Without --listen or --connect the other end is started here and ended afterwards.

Paths:
${Object.entries(BENCH_PATHS).map(([name, { summary }]) => `  ${name.padEnd(14)}  ${summary}`).join('\n')}

--preset collation reproduces LMCache's experiment: 16-token pages against 128-token slabs, by a call a piece and in one pass.
--preset overlap computes prefill's attention of the prompt on the first GPU and pushes each group of layers as it is computed: how much later than
without a hand-off decode has the prompt.`;
  static override examples = [
    '<%= config.bin %> <%= command.id %> --model deepseek-v3 --tokens 7500',
    '<%= config.bin %> <%= command.id %> --page-tokens 16,64,256 --view mla,tpla2,tpla2+64,dcp2 --path shm,tcp --csv sweep.csv --plot sweep.svg',
    '<%= config.bin %> <%= command.id %> --preset collation --path all',
    '<%= config.bin %> <%= command.id %> --path cuda-fd --target-dtype fp8 --require-path cuda-fd --json',
    '<%= config.bin %> <%= command.id %> --listen tcp://10.0.0.2:7400',
    '<%= config.bin %> <%= command.id %> --connect tcp://10.0.0.2:7400 --path tcp',
  ];
  static override enableJsonFlag = true;
  static override flags = {
    model: Flags.string({ options: Object.keys(MODELS), default: 'deepseek-v3', description: 'KV shape of a published model' }),
    layers: Flags.integer({ min: 1, max: 4096, description: "in place of the model's" }),
    latent: Flags.integer({ min: 1, max: 65536, description: "in place of the model's" }),
    rope: Flags.integer({ min: 0, max: 65536, description: "in place of the model's" }),
    tokens: Flags.string({ default: '7500', description: 'tokens of the prompt; list' }),
    path: Flags.string({ default: 'shm', description: 'how bytes move, see above; list, or all that this machine has' }),
    direction: Flags.string({ default: 'push', description: 'push: prefill writes; pull: decode reads; list' }),
    view: Flags.string({ default: 'mla', description: "decode's layout: mla, tplaN, tplaN+SHARED, tplaN+SHARED/SHARED (layers by turns), dcpN, dpN; list" }),
    'page-tokens': Flags.string({ default: '64', description: "tokens of prefill's pages: with the row they make the piece; list" }),
    'target-page-tokens': Flags.string({ description: "tokens of decode's pages; list; default as prefill's" }),
    dtype: Flags.string({ default: 'bf16', description: "prefill's KV: f32, bf16, fp8; list" }),
    'target-dtype': Flags.string({ description: "decode's KV; list; default as prefill's" }),
    'layers-per-push': Flags.string({ description: 'layers that one call covers; list; default a quarter' }),
    'tokens-per-push': Flags.string({ description: 'tokens that one call covers; list; default all' }),
    preset: Flags.string({ options: ['collation', 'overlap'], description: 'an experiment in place of the sweep, see above' }),
    heads: Flags.integer({ min: 1, max: 1024, default: 128, description: 'attention heads of --preset overlap' }),
    iterations: Flags.integer({ min: 1, default: 20, description: 'measured hand-offs a row' }),
    warmup: Flags.integer({ min: 0, default: 3, description: 'hand-offs before them' }),
    verify: Flags.boolean({ default: true, allowNo: true, description: "compare decode's pages byte for byte at the end of a row" }),
    'require-path': Flags.string({ options: [...PATHS], description: 'fail where the hand-off takes a slower path than this' }),
    listen: Flags.string({ description: 'serve the other end at unix:PATH or tcp://HOST:PORT until interrupted', exclusive: ['connect'] }),
    connect: Flags.string({ description: 'use the other end that listens there' }),
    timeline: Flags.boolean({ description: 'also print when each step happened in both processes of a host, in µs after the first push' }),
    csv: Flags.string({ description: 'write the rows to this file' }),
    plot: Flags.string({ description: 'write GB/s against piece size to this SVG file' }),
    once: Flags.boolean({ hidden: true, dependsOn: ['listen'] }),
  };

  async run(): Promise<{ rows: BenchRow[] | OverlapRow[] }> {
    const { flags } = await this.parse(BenchTransfer);
    if (flags.listen !== undefined) {
      await serveBench(flags.listen, createLogger('bench-transfer', 'decode', flags.once ? 'error' : 'info'), flags.once);
      return { rows: [] };
    }
    const cases = casesOf(flags);
    const isQuiet = this.jsonEnabled() || cases.length === 1;
    const options: BenchOptions = {
      iterations: flags.iterations, warmup: flags.warmup, verify: flags.verify, requirePath: flags['require-path'] as TransferPath | undefined,
      log: createLogger('bench-transfer', 'prefill', 'error'),
      onRow: (row) => { if (!isQuiet) process.stderr.write(`${row.path} ${row.view} ${row.piece_bytes} B: ${row.gb_per_s.toFixed(2)} GB/s\n`); },
    };
    if (flags.timeline) options.onTimeline = (what, handoffs) => this.log(`${what.path} ${what.view}, ${what.tokens} tokens\n${timelineTable(handoffs)}`);
    if (flags.preset === 'overlap') {
      const rows = await benchTransferBesidePrefill(cases, flags.heads, flags.connect, options);
      this.log(overlapTable(rows));
      if (flags.csv !== undefined) writeFileSync(flags.csv, toCsv(rows));
      return { rows };
    }
    const rows = await benchTransfer(cases, flags.connect, options);
    this.log(flags.preset === 'collation' ? collationTable(rows) : tableOf(rows));
    if (flags.csv !== undefined) writeFileSync(flags.csv, toCsv(rows));
    if (flags.plot !== undefined) writeFileSync(flags.plot, plotOf(rows));
    return { rows };
  }
}

interface CaseFlags {
  model: string;
  layers: number | undefined;
  latent: number | undefined;
  rope: number | undefined;
  tokens: string;
  path: string;
  direction: string;
  view: string;
  'page-tokens': string;
  'target-page-tokens': string | undefined;
  dtype: string;
  'target-dtype': string | undefined;
  'layers-per-push': string | undefined;
  'tokens-per-push': string | undefined;
  preset: string | undefined;
}

function casesOf(flags: CaseFlags): BenchCase[] {
  const model = MODELS[flags.model as ModelName];
  const shape: KvShape = { layers: flags.layers ?? model.layers, latent: flags.latent ?? model.latent, rope: flags.rope ?? model.rope };
  const paths = flags.path === 'all' ? availablePaths() : words(flags.path);
  const layersPerPush = flags['layers-per-push'] === undefined ? [Math.ceil(shape.layers / 4)] : numbers('layers-per-push', flags['layers-per-push']);
  const tokens = numbers('tokens', flags.tokens);
  if (flags.preset === 'collation') return collationCases(paths, shape, tokens[0]!, layersPerPush[0]!);
  return expand({
    shape, paths, directions: words(flags.direction), tokens, views: words(flags.view),
    pageTokens: numbers('page-tokens', flags['page-tokens']), targetPageTokens: numbers('target-page-tokens', flags['target-page-tokens']),
    dtypes: words(flags.dtype), targetDTypes: words(flags['target-dtype']),
    layersPerPush, tokensPerPush: numbers('tokens-per-push', flags['tokens-per-push']),
  });
}

function words(list: string | undefined): string[] {
  return list === undefined ? [] : list.split(',').map((word) => word.trim()).filter((word) => word !== '');
}

function numbers(flag: string, list: string | undefined): number[] {
  return words(list).map((word) => {
    const value = Number(word);
    if (!Number.isInteger(value) || value < 1) throw new TplaError('USAGE', `--${flag}: "${word}" is not a whole number from 1 on`);
    return value;
  });
}
