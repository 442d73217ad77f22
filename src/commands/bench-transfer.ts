import { writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { Flags } from '@oclif/core';
import { expand, expandStorage, inGroupsOf, MODELS, STORAGE_DIRECTIONS, type BenchCase, type KvShape, type ModelName } from '../bench/transfer/cases.js';
import { collationCases, collationTable } from '../bench/transfer/collation.js';
import { benchTransfer, benchTransferBesidePrefill, serveBench, type BenchOptions } from '../bench/transfer/command.js';
import { overlapTable, type OverlapRow } from '../bench/transfer/overlap.js';
import { availablePaths, BENCH_PATHS, isHandoff, wholeInGroups } from '../bench/transfer/paths.js';
import { COLUMNS, plotOf, tableOf, toCsv, type BenchRow } from '../bench/transfer/rows.js';
import { timelineTable } from '../bench/transfer/timeline.js';
import { BaseCommand } from '../cli/base_command.js';
import { TplaError } from '../errors.js';
import { createLogger } from '../log.js';
import { STORAGE_ENGINES } from '../native/types.js';
import { DIRECTIONS, PATHS, type TransferPath } from '../transfer/types.js';

/** What the end that connects decides. */
const MEASURED = [
  'model', 'layers', 'latent', 'rope', 'tokens', 'path', 'direction', 'view', 'page-tokens', 'target-page-tokens', 'dtype', 'target-dtype', 'layers-per-push', 'tokens-per-push', 'in-flight',
  'preset', 'iterations', 'warmup', 'require-path', 'timeline', 'csv', 'plot',
];

export default class BenchTransfer extends BaseCommand {
  static override summary = 'Measure KV hand-offs between two processes, verified';
  static override description = `Each row is real hand-offs, one request at a time unless --in-flight says more: pages reserved, every layer pushed, resharded and converted into
decode's pages, checksums verified, accepted. GB/s counts bytes in place over the median time until the last is there; latencies are those of one
request, from its first push to decode's word that all is accepted. The row before it is the plain copy that "of one copy" compares with: the same bytes between the same two
processes with nothing done to them (memcpy, one GPU copy, or raw sockets), its runs between those of the hand-off. Lists (a,b,c) are swept in
every combination. GB is 1e9 bytes.

Without --listen or --connect the other end is started here and ended afterwards.

Paths:
${Object.entries(BENCH_PATHS).map(([name, { summary }]) => `  ${name.padEnd(14)}  ${summary}`).join('\n')}

nvme hands nothing off: blocks of a sequence go from pages to a file and back, verified, and the path column says what moved them: cufile-gds
(GPUDirect Storage), cufile-compat (cuFile through host memory), io_uring or threads. Its plain copy is one file written or read from begin to end.

--preset collation reproduces LMCache's experiment: 16-token pages against 128-token slabs, by a call a piece and in one pass.
--preset overlap computes prefill's attention of the prompt on the first GPU and pushes each group of layers as it is computed: how much later than
without a hand-off decode has the prompt.`;
  static override examples = [
    '<%= config.bin %> <%= command.id %> --model deepseek-v3 --tokens 7500',
    '<%= config.bin %> <%= command.id %> --page-tokens 16,64,256 --view mla,tpla2,tpla2+64,dcp2 --path shm,tcp --csv sweep.csv --plot sweep.svg',
    '<%= config.bin %> <%= command.id %> --preset collation --path all',
    '<%= config.bin %> <%= command.id %> --path cuda-fd --target-dtype fp8 --require-path cuda-fd --json',
    '<%= config.bin %> <%= command.id %> --path nvme --directory /mnt/nvme --memory host,gpu --page-tokens 16,64 --pages-per-block 1,8 --queue-depth 4,16,64',
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
    path: Flags.string({ default: 'shm', description: 'how bytes move, see above; list, or all hand-offs that this machine has' }),
    direction: Flags.string({ description: 'push: prefill writes (default); pull: decode reads; of nvme write, read (default both); list' }),
    view: Flags.string({ default: 'mla', description: "decode's layout: mla, tplaN, tplaN+SHARED, tplaN+SHARED/SHARED (layers by turns), dcpN, dpN; list" }),
    'page-tokens': Flags.string({ default: '64', description: "tokens of prefill's pages: with the row they make the piece; list" }),
    'target-page-tokens': Flags.string({ description: "tokens of decode's pages; list; default as prefill's" }),
    dtype: Flags.string({ default: 'bf16', description: "prefill's KV: f32, bf16, fp8; list" }),
    'target-dtype': Flags.string({ description: "decode's KV; list; default as prefill's" }),
    'layers-per-push': Flags.string({ description: 'layers that one call covers; list; default as prefill pushes what it need not compute: groups that shrink between GPUs, quarters over PCIe, else all' }),
    'tokens-per-push': Flags.string({ description: 'tokens that one call covers; list; default all' }),
    'in-flight': Flags.string({ description: 'requests under way at a time, each into pages of its own; list; default 1' }),
    directory: Flags.string({ description: 'where nvme keeps its files while it runs; default the temporary directory' }),
    memory: Flags.string({ description: 'of nvme: host (default), gpu; list' }),
    mechanism: Flags.string({ description: `what moves nvme's blocks: ${STORAGE_ENGINES.join(', ')}; auto (default) takes the best there is; list` }),
    'pages-per-block': Flags.string({ description: "pages that lie together in nvme's file; list; default 1" }),
    'queue-depth': Flags.string({ description: "pieces of a block that io_uring keeps under way for nvme; list; default 16" }),
    threads: Flags.string({ description: 'blocks that nvme moves at a time; list; default 2' }),
    preset: Flags.string({ options: ['collation', 'overlap'], description: 'an experiment in place of the sweep, see above' }),
    heads: Flags.integer({ min: 1, max: 1024, default: 128, description: 'attention heads of --preset overlap' }),
    iterations: Flags.integer({ min: 1, default: 20, description: 'measured hand-offs a row' }),
    warmup: Flags.integer({ min: 0, default: 3, description: 'hand-offs before them' }),
    verify: Flags.boolean({ default: true, allowNo: true, description: "compare decode's pages byte for byte at the end of a row" }),
    'require-path': Flags.string({ options: [...PATHS], description: 'fail where the hand-off takes a slower path than this' }),
    listen: Flags.string({ description: 'serve the other end at unix:PATH or tcp://HOST:PORT until interrupted; the other end says what is measured', exclusive: ['connect', ...MEASURED] }),
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
    const notes = new Set<string>();
    const isQuiet = this.jsonEnabled() || cases.length === 1;
    const options: BenchOptions = {
      iterations: flags.iterations, warmup: flags.warmup, verify: flags.verify, requirePath: flags['require-path'] as TransferPath | undefined,
      log: createLogger('bench-transfer', 'prefill', 'error'),
      onRow: (row) => {
        if (row.storage?.passed_over) notes.add(`GPU memory goes through host memory: ${row.storage.passed_over}`);
        if (row.storage?.direct_io === false) notes.add(`the filesystem of ${flags.directory ?? tmpdir()} knows no direct I/O: its page cache is measured, not a disk`);
        if (!isQuiet) process.stderr.write(`${row.path} ${row.view} ${row.piece_bytes} B: ${row.gb_per_s.toFixed(2)} GB/s\n`);
      },
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
    for (const note of notes) process.stderr.write(`${note}\n`);
    if (flags.csv !== undefined) writeFileSync(flags.csv, toCsv(rows, COLUMNS));
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
  direction: string | undefined;
  view: string;
  'page-tokens': string;
  'target-page-tokens': string | undefined;
  dtype: string;
  'target-dtype': string | undefined;
  'layers-per-push': string | undefined;
  'tokens-per-push': string | undefined;
  'in-flight': string | undefined;
  preset: string | undefined;
  directory: string | undefined;
  memory: string | undefined;
  mechanism: string | undefined;
  'pages-per-block': string | undefined;
  'queue-depth': string | undefined;
  threads: string | undefined;
  'require-path': string | undefined;
}

function casesOf(flags: CaseFlags): BenchCase[] {
  const model = MODELS[flags.model as ModelName];
  const shape: KvShape = { layers: flags.layers ?? model.layers, latent: flags.latent ?? model.latent, rope: flags.rope ?? model.rope };
  const paths = flags.path === 'all' ? availablePaths() : words(flags.path);
  const tokens = numbers('tokens', flags.tokens);
  const layersPerPush = numbers('layers-per-push', flags['layers-per-push']);
  const handoffs = paths.filter(isHandoff);
  const hasStorage = handoffs.length < paths.length;
  if (flags.preset !== undefined && flags['in-flight'] !== undefined) throw new TplaError('USAGE', `--preset ${flags.preset} has one request under way; leave --in-flight out`);
  checkStorageFlags(flags, handoffs.length > 0, hasStorage);
  if (flags.preset === 'collation') {
    checkCollationFlags(flags);
    const [count] = layersPerPush;
    return collationCases(paths, shape, tokens[0]!, (path, target) => (count === undefined ? wholeInGroups(path, target, tokens[0]!) : inGroupsOf(count, shape.layers)));
  }
  const directions = words(flags.direction);
  const of = (known: readonly string[], otherwise: string[]) => (directions.length === 0 ? otherwise : directions.filter((direction) => known.includes(direction)));
  const [dtypes, pageTokens] = [words(flags.dtype), numbers('page-tokens', flags['page-tokens'])];
  const storage = !hasStorage ? [] : expandStorage({
    shape, directory: flags.directory ?? tmpdir(), directions: of(STORAGE_DIRECTIONS, [...STORAGE_DIRECTIONS]), tokens, dtypes, pageTokens,
    pagesPerBlock: numbersOr(1, 'pages-per-block', flags['pages-per-block']), memories: words(flags.memory ?? 'host'), engines: words(flags.mechanism ?? 'auto'),
    queueDepths: numbersOr(16, 'queue-depth', flags['queue-depth']), threads: numbersOr(2, 'threads', flags.threads),
  });
  return [...expand({
    shape, paths: handoffs, directions: of(DIRECTIONS, ['push']), tokens, views: words(flags.view),
    pageTokens, targetPageTokens: numbers('target-page-tokens', flags['target-page-tokens']),
    dtypes, targetDTypes: words(flags['target-dtype']),
    layersPerPush, tokensPerPush: numbers('tokens-per-push', flags['tokens-per-push']), inFlight: numbersOr(1, 'in-flight', flags['in-flight']), wholeInGroups,
  }), ...storage];
}

/** Refuses what the experiment itself decides: pieces of 16 and 128 tokens, canonical and in bf16, of one prompt. */
function checkCollationFlags(flags: CaseFlags): void {
  const own = { view: 'mla', dtype: 'bf16', direction: undefined, 'page-tokens': '64', 'target-page-tokens': undefined, 'target-dtype': undefined, 'tokens-per-push': undefined } as const;
  const stray = (Object.keys(own) as (keyof typeof own)[]).find((flag) => flags[flag] !== own[flag]);
  if (stray !== undefined) throw new TplaError('USAGE', `--preset collation has its own pieces and takes no --${stray}`);
  if (words(flags.tokens).length !== 1) throw new TplaError('USAGE', `--preset collation takes one number of --tokens, not ${flags.tokens}`);
}

const STORAGE_FLAGS = ['directory', 'memory', 'mechanism', 'pages-per-block', 'queue-depth', 'threads'] as const;
const HANDOFF_FLAGS = ['target-page-tokens', 'target-dtype', 'layers-per-push', 'tokens-per-push', 'in-flight', 'require-path'] as const;

/** Refuses what would be left out in silence. */
function checkStorageFlags(flags: CaseFlags, hasHandoff: boolean, hasStorage: boolean): void {
  const known: readonly string[] = [...(hasHandoff ? DIRECTIONS : []), ...(hasStorage ? STORAGE_DIRECTIONS : [])];
  const stray = words(flags.direction).find((direction) => !known.includes(direction));
  if (stray !== undefined) throw new TplaError('USAGE', `direction "${stray}" is none of ${known.join(', ')}, which --path ${flags.path} takes`);
  const lost = hasStorage ? undefined : STORAGE_FLAGS.find((flag) => flags[flag] !== undefined);
  if (lost !== undefined) throw new TplaError('USAGE', `--${lost} is for --path nvme`);
  if (hasStorage && flags.preset !== undefined) throw new TplaError('USAGE', `--preset ${flags.preset} is for hand-offs, and path nvme is none`);
  if (hasHandoff) return;
  const unused = HANDOFF_FLAGS.find((flag) => flags[flag] !== undefined);
  if (unused !== undefined) throw new TplaError('USAGE', `--${unused} is for hand-offs, and path nvme is none${unused === 'require-path' ? '; --mechanism says what must move its blocks' : ''}`);
  if (flags.view !== 'mla') throw new TplaError('USAGE', `--view ${flags.view}: blocks on a disk are canonical, path nvme takes mla`);
}

function words(list: string | undefined): string[] {
  return list === undefined ? [] : list.split(',').map((word) => word.trim()).filter((word) => word !== '');
}

const numbersOr = (otherwise: number, flag: string, list: string | undefined): number[] => (list === undefined ? [otherwise] : numbers(flag, list));

function numbers(flag: string, list: string | undefined): number[] {
  return words(list).map((word) => {
    const value = Number(word);
    if (!Number.isInteger(value) || value < 1) throw new TplaError('USAGE', `--${flag}: "${word}" is not a whole number from 1 on`);
    return value;
  });
}
