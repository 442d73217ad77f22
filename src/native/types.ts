/**
 * What the addon exports, as TypeScript sees it. Every asynchronous call computes off the event loop.
 * Errors carry a `code` of `src/errors.ts`.
 */
import type { SharedWidths } from '../model/shared_widths.js';
import type { ModelSpec } from '../model/spec.js';
import type { AttentionModule } from './attention.js';
import type { ReparamModule } from './reparam.js';

export type WeightDType = 'F32' | 'BF16' | 'F16' | 'F8_E4M3';
export type KvDType = 'f32' | 'bf16' | 'fp8';

// ---------------------------------------------------------------- probe

export interface ProbeResult {
  version: string;
  cpu: { model: string; cores: number; features: string[]; kernel: string; blas: string | null };
  cuda: {
    compiled: boolean;
    driver: string | null;
    reason: string | null;
    devices: { index: number; name: string; capability: string; memoryBytes: number; multiprocessors: number; peers: number[] }[];
  };
  /** Libraries looked for at run time: path where found, and why not where not. */
  libraries: { name: string; path: string | null; detail: string }[];
}

/** What the processor and its memory give when nothing else limits them. */
export interface CpuRates {
  isa: string;
  threads: number;
  fp32FlopsPerSecond: number;
  /** 0 without bf16 hardware. */
  bf16FlopsPerSecond: number;
  readBytesPerSecond: number;
  /** Read and written. */
  copyBytesPerSecond: number;
}

// ---------------------------------------------------------------- weights

export interface TensorEntry {
  name: string;
  /** Index into `files`. */
  file: number;
  dtype: WeightDType;
  shape: number[];
  /** Absolute byte range in the file. */
  begin: number;
  end: number;
}

/** Tensors of a checkpoint, mapped read-only. TypeScript has validated headers, ranges and shapes. */
export interface Weights {
  readonly bytes: number;
  /** One tensor, dequantised (block scales applied when `scale` names them) to fp32, row-major. */
  read(name: string, scale?: { name: string; block: [number, number] }): Float32Array;
  /** Gives the mapped pages back to the kernel; they are read from disk again when used. For passes over checkpoints larger than memory. */
  release(): void;
  close(): void;
}

// ---------------------------------------------------------------- KV arenas

export type KvForm = 'mla' | 'tpla' | 'dcp' | 'dp';

/**
 * How the KV of a sequence lies over the ranks of one worker.
 * - mla: every rank holds every token, whole width (replicated; one copy is kept when ranks share memory)
 * - tpla: every rank holds every token; shared ∪ slice i ∪ rope
 * - dcp: logical page j lives on rank j % ranks, whole width
 * - dp: the whole sequence lives on one rank
 */
export interface KvLayout {
  form: KvForm;
  ranks: number;
  layers: number;
  latent: number;
  rope: number;
  /** tpla only: width replicated on all ranks. */
  shared: SharedWidths;
  dtype: KvDType;
  /** Tokens per page, a multiple of 16. */
  pageTokens: number;
}

/**
 * Paged KV memory of one worker: per rank one memfd laid out [layer][page][token][rank width].
 * See native/core/kv_layout.h for the byte layout of a token in each dtype.
 */
export interface KvArena {
  readonly layout: KvLayout;
  /** Pages per rank. */
  readonly pages: number;
  readonly bytes: number;
  /** All layers, mean over the ranks: with dcp and dp a token is on one of them only. */
  readonly bytesPerTokenPerRank: number;
  /** Descriptors of the ranks' memory, to be passed over a Channel. The arena keeps owning them. */
  fds(): number[];
  /** Raw bytes of one page of one layer on one rank (tests and tools; a view, not a copy). */
  page(rank: number, layer: number, page: number): Uint8Array;
  close(): void;
}

// ---------------------------------------------------------------- engine

export interface EngineOptions {
  spec: ModelSpec;
  weights: Weights;
  /** Where KV is read and written. Its layout decides the attention form of decode. */
  arena: KvArena;
  /** Compute threads over all ranks; 0 = all cores this process may use. */
  threads: number;
  /** Test only: gather the ranks' logits before the softmax so that tpla equals mla. */
  exactSoftmax?: boolean;
  /** Instruction set of the CPU kernels: portable, blas, avx2, avx512, avx512_bf16 or amx; the best this CPU has when left out. */
  isa?: string;
  /**
   * What matrix products of larger batches see of the activations where they run on bf16 hardware: f32 (default) equals fp32
   * arithmetic, bf16x2 keeps 16 bits of the mantissa, bf16 rounds to 8 bits as GPUs do. Fewer bits are faster on AMX; AVX-512 BF16 is
   * used for bf16 only; without such hardware everything is fp32.
   */
  activations?: 'f32' | 'bf16x2' | 'bf16';
}

export interface PrefillItem {
  /** Tokens of this chunk. */
  tokens: Int32Array;
  /** Position of the first of them; KV of 0..position-1 is already in `pages`. */
  position: number;
  /** Page table of the sequence on rank 0 covering position + tokens.length tokens. */
  pages: Int32Array;
  logits: 'none' | 'last' | 'all';
}

export interface DecodeItem {
  token: number;
  /** Position of `token`; its KV is written there, then attention reads 0..position. */
  position: number;
  /** Page table per rank. mla, tpla: one table that holds for every rank. dcp: one per rank, page j at [j % ranks][j / ranks | 0]. dp: one table, with `rank`. */
  pages: Int32Array[];
  /** dp only: the rank that holds the sequence. */
  rank?: number;
}

export interface Engine {
  /**
   * Exact un-absorbed MLA over chunks of one or more sequences; needs an arena of form mla with one rank (canonical KV).
   * `onLayer(l)` fires, in order, once layer l's KV of the whole batch is in the arena while later layers still compute.
   * Result: per item, fp32 logits: empty, [vocab], or [tokens, vocab].
   */
  prefill(items: PrefillItem[], onLayer?: (layer: number) => void, signal?: CancelFlag): Promise<Float32Array[]>;
  /**
   * Prefill without logits that also hands out queries: after each layer's KV is in the arena, `onLayer(l, queries)` gets
   * [rows.length, heads, nope + rope] fp32, rope part rotated, for the rows named (counted over all items' tokens, ascending). The
   * pass waits for the callback, so that memory stays bounded; what it throws ends the pass.
   */
  captureQueries(items: PrefillItem[], rows: Int32Array, onLayer: (layer: number, queries: Float32Array) => void): Promise<void>;
  /**
   * One token per item, absorbed attention in the arena's form. Result: fp32 logits [items, vocab], row by row.
   * Items of one call may be consecutive positions of one sequence: in each layer the KV of all items is written before any attends.
   */
  decode(items: DecodeItem[]): Promise<Float32Array>;
  close(): void;
}

/** Shared one-word flag; set to non-zero to make a running prefill stop at the next layer with code CANCELLED. */
export type CancelFlag = Int32Array;

// ---------------------------------------------------------------- sampling

export interface SamplingParams {
  /** 0 = greedy. */
  temperature: number;
  /** 0 = off. */
  topK: number;
  topP: number;
  minP: number;
  repetitionPenalty: number;
  presencePenalty: number;
  frequencyPenalty: number;
  seed: bigint;
  /** Number of alternatives to report with the chosen token's logprob; -1 = no logprobs. */
  logprobs: number;
  logitBias: { token: number; bias: number }[];
}

export interface SampledToken {
  token: number;
  /** Natural log of the probability under the unmodified softmax; NaN when not asked for. */
  logprob: number;
  top: { token: number; logprob: number }[];
}

/** Draws tokens for one sequence; reproducible from seed and step alone. */
export interface Sampler {
  /** Tokens the penalties count, prompt first. */
  accept(tokens: Int32Array, isPrompt: boolean): void;
  /** `step` counts generated tokens from 0; logits are not modified. */
  sample(logits: Float32Array, step: number): SampledToken;
}

// ---------------------------------------------------------------- memory and channels between processes

/** Memory that another process can map: a memfd, or one received over a channel. */
export interface SharedMemory {
  readonly bytes: number;
  readonly fd: number;
  /** View of the whole mapping; detached by close(), which unmaps at once. */
  readonly buffer: ArrayBuffer;
  close(): void;
}

/** Message stream over a Unix socket that can carry descriptors (SCM_RIGHTS). */
export interface Channel {
  readonly peer: { pid: number; uid: number };
  /** Frames one message of at most 16 MiB and 64 descriptors; `fds` are duplicated into the peer. Throws IO_FAILED after close(). */
  send(message: Uint8Array, fds?: number[]): void;
  /** Sends what is queued, then ends the connection; onClose follows. */
  close(): void;
  /** A hand-off whose pushes land in these pages: what comes of it is verified against them (onPushed) until forget(). */
  expect(session: string, arena: KvRegion | KvArena, pages: Int32Array[], rank?: number): void;
  forget(session: string): void;
}

/** Where a put tells the receiver of its end: `pushed` with checksums (src/transfer/messages.ts), sent before the put's promise resolves. */
export interface PutAnnouncement {
  channel: Channel;
  session: string;
}

export interface ChannelHandlers {
  /**
   * Where it is given, `pushed` does not come to onMessage: off the event loop its checksums are computed over the pages of its session (expect), then
   * this is called, `problem` null where they match, of code CHECKSUM_MISMATCH where not, REQUEST_INVALID for what lies outside the pages,
   * PROTOCOL for a session that is not expected.
   */
  onPushed?(channel: Channel, session: string, layers: [number, number], tokens: [number, number], problem: Error | null): void;
  /** `fds` belong to the handler, which closes them (fs.closeSync) once it has mapped or duplicated them. */
  onMessage(channel: Channel, message: Uint8Array, fds: number[]): void;
  /** Once per channel, its last event; the kernel's word when the peer dies. */
  onClose(channel: Channel, reason: string): void;
}

/** A Unix socket's path, or a TCP end (which carries no descriptors and whose peer is all zeros). */
export type ChannelAddress = string | { host: string; port: number };

export interface ChannelServer {
  /** TCP port as bound; 0 for a Unix socket. */
  readonly port: number;
  /** Stops listening and removes the socket file; open channels live on. */
  close(): void;
}

// ---------------------------------------------------------------- transfer

/**
 * KV pages in GPU memory, rank r on devices[r % devices.length]; page() gives a copy. kvPut and kvChecksum take it like any arena and work
 * on the GPU; host memory goes together with it once it is pinned (pinKvRegion).
 */
export interface CudaKvArena extends KvArena {
  /** Index, in this process, of the GPU that does the work. */
  readonly device: number;
  /** UUID of the GPU behind each rank's memory, the same in every process of the host. */
  readonly devices: string[];
  /** With sharing 'ipc' what a peer opens instead of descriptors; else empty. */
  ipcHandles(): string[];
}

export interface TimelineMark {
  step: string;
  /** Microseconds of CLOCK_MONOTONIC: the same clock in every process of a host. */
  at: number;
}

/** One side of a KV transfer: an arena of this process, or a peer's arena mapped here. */
export interface KvRegion {
  readonly layout: KvLayout;
  readonly pages: number;
  close(): void;
}

export interface KvPut {
  src: KvRegion | KvArena;
  dst: KvRegion | KvArena;
  /** Layers [begin, end). */
  layers: [number, number];
  /** Tokens [begin, end) of the sequence. */
  tokens: [number, number];
  /** Page tables as in DecodeItem.pages, of the whole sequence, each in its own layout. */
  srcPages: Int32Array[];
  dstPages: Int32Array[];
  /** dp only. */
  srcRank?: number;
  dstRank?: number;
  /** Shown at the destination's gate before each piece; where it is shut the put ends with CANCELLED. */
  pass?: WritePass;
  announce?: PutAnnouncement;
}

/**
 * Shuts out a process that has this one's memory mapped: one word per slot in memory that both see. The owner opens a slot for a session
 * and revokes it; once no writer is inside, none can come. See native/transfer/write_gate.h.
 */
export interface WriteGate {
  readonly fd: number;
  /** The epoch that lets writers in. Throws REQUEST_INVALID while the slot is in use. */
  open(slot: number): number;
  /** Number of writers still inside; 0 means the memory is safe. */
  revoke(slot: number): number;
  writers(slot: number): number;
  close(): void;
}

export interface WritePass {
  gate: WriteGate;
  slot: number;
  epoch: number;
}

/** Decode's side of KV between processes that share no memory (native/transfer/kv_link.h). Every write into the arena passes a gate. */
export interface KvLinkReceiver {
  /** Senders that show `key`, 32 ASCII characters, write through `gate`. */
  admit(key: string, gate: WriteGate): void;
  /** What a slot of that key's gate stands for while `epoch` lasts. */
  grant(key: string, slot: number, epoch: number, tokens: [number, number], pages: Int32Array[], rank?: number): void;
  /** Ends the sender's connections, with what it is in the middle of. */
  disconnect(key: string): void;
  withdraw(key: string): void;
  close(): void;
}

/** Prefill's side, connected to one receiver. */
export interface KvLinkSender {
  /** Resolves once the receiver has all of it in its pages; rejects with CANCELLED where the gate is shut, IO_FAILED where the link is lost. */
  put(put: { src: KvRegion | KvArena; layers: [number, number]; tokens: [number, number]; srcPages: Int32Array[]; srcRank?: number; slot: number; epoch: number; announce?: PutAnnouncement }): Promise<KvPutResult>;
  close(): void;
}

/** KV over TCP (native/transfer/kv_stream.h). */
export interface KvStreamReceiver extends KvLinkReceiver {
  readonly port: number;
}

export interface KvStreamSender extends KvLinkSender {
  /** Whether the kernel sends from our buffers (MSG_ZEROCOPY); it does not on loopback. */
  readonly zeroCopy: boolean;
}

/**
 * How rows of an end get to the library (native/transfer/messages/): from and to host memory, from and to a GPU's own memory, or to and from a
 * GPU through pinned memory of the host.
 */
export type LinkMemory = 'host' | 'gpu' | 'staged';

export interface KvMessageReceiver extends KvLinkReceiver {
  /** What a sender connects to. */
  readonly address: Buffer;
  readonly memory: LinkMemory;
}

export interface KvMessageSender extends KvLinkSender {
  readonly memory: LinkMemory;
  /** `transport/device` pairs that carry it, as the library tells by now; none where it does not tell. */
  transports(): string[];
}

export interface KvMessageLink {
  address: Buffer;
  key: string;
  /** The receiver's. */
  layout: KvLayout;
  /** GPU that holds the sources of its puts; none where they are in host memory. */
  device?: number;
}

/** A UCX: its file and what it says of itself: version, `transport/device` pairs, whether any of them is RDMA, whether it takes GPU memory. */
export interface UcxFacts {
  readonly library: string;
  readonly version: string;
  readonly resources: string[];
  readonly rdma: boolean;
  readonly cuda: boolean;
}

/** KV over UCX (native/transfer/ucx/): one installation, loaded at run time, with a worker and its thread. */
export interface Ucx extends UcxFacts {
  listen(arena: KvRegion | KvArena): Promise<KvMessageReceiver>;
  connect(link: KvMessageLink): Promise<KvMessageSender>;
  /** Ends its thread and every link. */
  close(): void;
}

/** KV over NIXL (native/transfer/nixl/): its C API, loaded at run time, with an agent and the thread that drives it. */
export interface Nixl {
  /** The library's file, every plug-in that it can load here, and those in use with the kinds of memory they carry (DRAM, VRAM …). */
  readonly library: string;
  readonly plugins: string[];
  readonly backends: { name: string; memories: string[] }[];
  /** The UCX under its backend of that name; null where there is none, or none that can be asked. */
  readonly ucx: UcxFacts | null;
  listen(arena: KvRegion | KvArena): Promise<KvMessageReceiver>;
  connect(link: KvMessageLink): Promise<KvMessageSender>;
  /** Ends its thread and every link. */
  close(): void;
}

export interface KvStreamOptions {
  host: string;
  port: number;
  key: string;
  /** 1 to 64 TCP connections side by side. */
  connections: number;
  /** The receiver's. */
  layout: KvLayout;
  zeroCopy?: 'auto' | 'never' | 'always';
}

/** A put from pages of the whole sequence, layers and tokens [begin, end). */
export type PreparedKvPut = (srcPages: Int32Array, firstLayer: number, endLayer: number, firstToken: number, endToken: number) => Promise<KvPutResult>;

export interface KvPutResult {
  bytes: number;
  /** What travelled: more than `bytes` where frames have headers and answers. */
  wireBytes: number;
  /** When the last byte was in place: microseconds of the host's monotonic clock. */
  placedAt: number;
  /**
   * Checksums of what was written: [logical destination page, from the first that `tokens` touch][copy], summed over the layers and tokens of
   * this call; parts of one page add modulo 2^64. tpla keeps one copy of a page per rank, the other forms keep one.
   */
  checksums: BigUint64Array;
}

export interface PrefillLoad {
  /** Behind the layers of earlier calls; resolves when these are computed. */
  compute(layers: number): Promise<void>;
  close(): void;
}

// ---------------------------------------------------------------- storage

/** What a slot of a block file holds. */
export interface BlockRecord {
  /** 32 hexadecimal digits. */
  id: string;
  /** Which block of its sequence it is. */
  index: number;
  /** Rows that are filled. */
  tokens: number;
  /** Of those rows, as kvChecksum gives it, decimal. */
  checksum: string;
}

/** What moves pages between memory and a file: cuFile by GPUDirect Storage or in its compatibility mode, io_uring, or plain calls of threads. */
export type StorageMechanism = 'cufile-gds' | 'cufile-compat' | 'io_uring' | 'threads';

/** Canonical blocks in the slots of one file (native/storage/block_file.h). Calls queue up behind its threads; pages are the caller's while one is under way. */
export interface BlockFile {
  readonly engine: 'io_uring' | 'threads';
  /** Past the page cache (O_DIRECT). */
  readonly direct: boolean;
  /** The file was made, or emptied because it held something else. */
  readonly fresh: boolean;
  readonly slots: number;
  /** What the slots say they hold; rows are verified when they are read. */
  scan(): Promise<(BlockRecord & { slot: number })[]>;
  /** In host memory, or of one GPU; a page, or as many as the record's tokens fill, in their order. */
  write(slot: number, region: KvRegion | KvArena, pages: number | Int32Array, record: BlockRecord): Promise<void>;
  /** False where the slot does not hold, whole, what the record says. */
  read(slot: number, region: KvRegion | KvArena, pages: number | Int32Array, record: BlockRecord): Promise<boolean>;
  erase(slot: number): Promise<void>;
  /** What moves this memory, and for GPU memory why not GPUDirect Storage. The first question about GPU memory loads cuFile. */
  mechanism(region: KvRegion | KvArena): Promise<{ mechanism: StorageMechanism; passedOver: string | null }>;
  /** Waits for what is under way. */
  close(): void;
}

export interface BlockFileOptions {
  path: string;
  /** Canonical. */
  layout: KvLayout;
  bytes: number;
  /** Transfers at a time, and pieces of one under way at a time. */
  threads: number;
  depth: number;
  /** 1 when left out. */
  pagesPerBlock?: number;
  /** auto: GPU memory by cuFile where that is GPUDirect Storage, else through pinned host memory. With cufile nothing but GPU memory is moved. */
  engine?: StorageEngine;
}

export const STORAGE_ENGINES = ['auto', 'cufile', 'io_uring', 'threads'] as const;
export type StorageEngine = (typeof STORAGE_ENGINES)[number];

/** A file from its begin to its end, by one thread: what blocks on disk are measured against. Times in seconds. */
export interface PlainFile {
  readonly direct: boolean;
  write(bytes: number): Promise<number>;
  read(bytes: number): Promise<number>;
  close(): void;
}

// ---------------------------------------------------------------- module

export interface NativeModule extends ReparamModule, AttentionModule {
  /** Version of the package it was built from. */
  version: string;
  /** Everything `tpla doctor` wants to know; starts the CUDA driver where there is one. */
  probe(): ProbeResult;
  /** Measures this machine for about a second, on the calling thread too; `isa` as in EngineOptions. */
  measureCpu(threads: number, isa?: string): CpuRates;
  /** Throws IO_FAILED, REQUEST_INVALID where `bytes` hold no block. */
  openBlockFile(options: BlockFileOptions): BlockFile;
  /** For benchmarks. Makes the file. */
  openPlainFile(path: string, engine: StorageEngine, depth: number): PlainFile;
  /** What cuFile says of itself. Loads it; throws REQUEST_INVALID where it is not installed or does not start. */
  describeCuFile(): { path: string; version: string; gds: boolean; detail: string };
  /** Loads UCX from the absolute path of libucp, under the UCX_… settings of the environment. Throws CONFIG_INVALID saying what is wrong with either. */
  openUcx(library: string): Promise<Ucx>;
  /** Loads NIXL's C API from a file, or by a name that the loader knows, and starts the named backends; none just asks for plug-ins. Throws CONFIG_INVALID. */
  openNixl(library: string, backends: string[]): Promise<Nixl>;
  /** Sends a state such as `READY=1` to systemd; `socket` is the value of NOTIFY_SOCKET. */
  notifyServiceManager(socket: string, state: string): void;
  Weights: new (files: string[], tensors: TensorEntry[]) => Weights;
  KvArena: new (layout: KvLayout, pages: number) => KvArena;
  Engine: new (options: EngineOptions) => Engine;
  Sampler: new (params: SamplingParams) => Sampler;
  SharedMemory: { create(bytes: number, name: string): SharedMemory; map(fd: number, bytes: number): SharedMemory };
  /** Throws ADDRESS_IN_USE; removing a stale socket file (removeStaleSocket) is the caller's. `onConnection` runs before the channel's first message. */
  listenChannel(address: ChannelAddress, onConnection: (channel: Channel) => void, handlers: ChannelHandlers): ChannelServer;
  connectChannel(address: ChannelAddress, handlers: ChannelHandlers): Promise<Channel>;
  WriteGate: { create(slots: number): WriteGate; map(fd: number, slots: number): WriteGate };
  /** Of builds with CUDA; others throw REQUEST_INVALID. Sharing: 'descriptor' (VMM, fds() travel over a Channel) or 'ipc'. */
  CudaKvArena: new (layout: KvLayout, pages: number, devices: number[], sharing?: 'descriptor' | 'ipc') => CudaKvArena;
  /** Maps a peer's GPU arena, from its descriptors or IPC handles, for puts by `device`. */
  mapCudaKvRegion(layout: KvLayout, pages: number, memories: number[] | string[], device: number): KvRegion;
  /** Host pages as `device` uses them directly. The region stays mapped as long as the result is open. */
  pinKvRegion(region: KvRegion | KvArena, device: number): KvRegion;
  cudaDeviceUuid(device: number): string;
  /** Listens for KV on any port of `host`. Throws IO_FAILED. */
  listenKvStream(host: string, arena: KvArena): KvStreamReceiver;
  connectKvStream(options: KvStreamOptions): Promise<KvStreamSender>;
  /** Maps a peer's arena from the descriptors it passed. */
  mapKvRegion(layout: KvLayout, pages: number, fds: number[]): KvRegion;
  /** Gathers, reshards and converts pages from one region into another. */
  kvPut(put: KvPut): Promise<KvPutResult>;
  /** Puts between these will follow soon: where a GPU makes them, what they need is made, and the thread that launches them woken. */
  expectKvPuts(src: KvRegion | KvArena, dst: KvRegion | KvArena): void;
  /** What the puts of one hand-off have in common, taken over once: each then costs its caller a few microseconds. Keeps neither memory open. */
  prepareKvPut(common: Omit<KvPut, 'layers' | 'tokens' | 'srcPages'>): PreparedKvPut;
  /** The same checksums computed over what `region` holds. */
  kvChecksum(region: KvRegion | KvArena, layers: [number, number], tokens: [number, number], pages: Int32Array[], rank?: number): Promise<BigUint64Array>;
  /** Copies a whole page, all layers (copy-on-write): on every rank with mla and tpla, on `rank` with dcp and dp. */
  kvCopyPage(arena: KvRegion | KvArena, from: number, to: number, rank?: number): void;
  /** For benchmarks: values that seed, layer (from `firstLayer` on), token and column decide, in canonical host pages. */
  kvFillPattern(arena: KvRegion | KvArena, pages: Int32Array[], tokens: [number, number], firstLayer: number, seed: number): Promise<void>;
  /** For benchmarks: the same bytes moved with nothing done to them, in seconds: memory to memory, and over TCP into a sink. */
  kvPlainCopy(src: KvRegion | KvArena, dst: KvRegion | KvArena, bytes: number, threads: number): Promise<number>;
  listenSink(host: string): ChannelServer;
  plainSend(host: string, port: number, connections: number, bytes: number): Promise<number>;
  /** For benchmarks: prefill's causal attention (192/128) of one prompt on a GPU, for work beside a hand-off. Throws GPU_UNAVAILABLE. */
  prefillLoad(device: number, tokens: number, heads: number): PrefillLoad;
  /** For benchmarks: when the steps of hand-offs happened in this process, kept from keepTimeline(true) on; taking forgets. */
  keepTimeline(keep: boolean): void;
  takeTimeline(): TimelineMark[];
  /** Instruction set of the CPU transfer loops, chosen by name where one is given (avx512, avx2, portable): for tests and benchmarks. */
  kvKernels(name?: string): string;
}
