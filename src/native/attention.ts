/** The part of the addon that draws attention problems, holds kernels against a float64 reference and times them. */

/** Where a problem runs: a GPU by index, or the CPU with `threads` threads (0: all this process may use). */
export type AttentionTarget = { kind: 'gpu'; index: number } | { kind: 'cpu'; threads: number };

export type AttentionPath = 'auto' | 'sm90' | 'sm80';

interface AttentionProblemBase {
  /** Per sequence; kvLens counts the query tokens too. */
  qLens: Int32Array;
  kvLens: Int32Array;
  heads: number;
  /** Among the query tokens: query i of q sees keys up to kvLen - q + i. */
  causal: boolean;
  /** Standard deviation of the queries; keys and values have 1. Large ones make the softmax pick single tokens. */
  queryScale: number;
  path: AttentionPath;
}

/** Absorbed MLA or TPLA decode over paged latents. */
export interface DecodeProblem extends AttentionProblemBase {
  kind: 'decode';
  latent: number;
  rope: number;
  pageTokens: number;
  /** Bytes between one page and the next, a multiple of 16. */
  pageGapBytes: number;
  kvDType: 'bf16' | 'fp8' | 'f32';
  /** Draws TPLA's logit factor per head. */
  latentScale: boolean;
  variants?: LogitVariantsProblem;
}

/** Softcap, then ALiBi, then what a query does not see: tokens before its window, and tokens of blocks that are not listed. */
export interface LogitVariantsProblem {
  /** 0: none. */
  softcap: number;
  /** Tokens, the query's own included; 0: all. */
  window: number;
  /** With the slopes 2^(-8 (h + 1) / heads). */
  alibi: boolean;
  /** Tokens of a block, a multiple of 16; 0: no block mask. */
  maskBlock: number;
  /** Visible blocks of each sequence, and their numbers, sequence after sequence, ascending. */
  maskCounts: Int32Array;
  maskBlocks: Int32Array;
}

/** Decode with keys and values of their own (GQA, MQA, MHA): query head h reads KV head h / (heads / kvHeads). */
export interface GqaProblem extends AttentionProblemBase {
  kind: 'gqa';
  kvHeads: number;
  headDim: number;
  pageTokens: number;
  /** Bytes between one page and the next, a multiple of 16. */
  pageGapBytes: number;
  /** Order in a page: token, KV head, value; or KV head, token, value. */
  layout: 'nhd' | 'hnd';
  variants?: LogitVariantsProblem;
}

/** Un-absorbed prefill, every head with keys and values of its own. */
export interface PrefillProblem extends AttentionProblemBase {
  kind: 'prefill';
  keyDim: number;
  valueDim: number;
}

export type ChunkForm = 'auto' | 'absorbed' | 'unabsorbed';

/** A chunk of prefill at the end of cached latents (512 + 64), from queries before absorption to values of 128. */
export interface ChunkProblem extends AttentionProblemBase {
  kind: 'chunk';
  pageTokens: number;
  kvDType: 'bf16' | 'fp8' | 'f32';
  form: ChunkForm;
}

/** Prefill and decode of one step, in one launch where the GPU has a kernel for it. */
export interface PodProblem {
  kind: 'pod';
  prefill: PrefillProblem;
  decode: DecodeProblem;
  /** Multiprocessors that begin with decode; 0: chosen on the device. */
  decodeMultiprocessors: number;
}

export type AttentionProblem = DecodeProblem | GqaProblem | PrefillProblem | ChunkProblem | PodProblem;

export interface AttentionRunOptions {
  seed: number;
  /** Launches whose results must have the same bits, outputs poisoned with NaN before each; 0: no check. */
  repeats: number;
  /** Timed repetitions; 0: no timing. */
  runs: number;
  /** Where the reference is computed: `auto` is where the problem runs. */
  reference: 'auto' | 'cpu';
}

export interface AttentionCheck {
  /** Largest ‖out - reference‖ / ‖reference‖ of a query row; absolute where the reference is zero; NaN where the result is. */
  worstRow: number;
  /** The same over the whole output. */
  overall: number;
  /** Largest difference of a row's log-sum-exp; 0 where the call gives none. */
  worstLse: number;
  sameBits: boolean;
  repeats: number;
  reference: string;
}

/** Milliseconds of one call; a run is `callsPerRun` calls that take `buffers` sets of inputs in turn. */
export interface AttentionTiming {
  medianMs: number;
  minMs: number;
  maxMs: number;
  runs: number;
  callsPerRun: number;
  buffers: number;
}

export interface AttentionOutcome {
  /** Kernel family, `sm90 fused` for prefill and decode in one launch, or the CPU's instruction set; of a chunk after its form: `absorbed, sm90`. */
  kernel: string;
  check: AttentionCheck | null;
  timing: AttentionTiming | null;
  /** Of a PodProblem: prefill, then decode, in two launches. */
  serial: AttentionTiming | null;
  /** Of a ChunkProblem on a GPU whose form is `auto`: both, timed in turns. `timing` is that of the one that was chosen. */
  absorbed: AttentionTiming | null;
  unabsorbed: AttentionTiming | null;
}

export interface AttentionRates {
  /** Large copies, bytes read and written. */
  copyBytesPerSecond: number;
  /** Dense matrix products: bf16 on GPUs, fp32 on CPUs. */
  matrixFlopsPerSecond: number;
  matrixSource: string;
}

export interface GpuDescription {
  name: string;
  capability: string;
  multiprocessors: number;
  l2Bytes: number;
  memoryBytes: number;
  /** Highest clocks; 0 where the driver does not say. */
  smClockHz: number;
  memoryClockHz: number;
}

export interface AttentionModule {
  /**
   * Errors: GPU_UNAVAILABLE where the addon has no CUDA or the GPU cannot be used, REQUEST_INVALID for a shape the kernels do not take, OUT_OF_MEMORY,
   * GPU_FAILED. One problem runs at a time.
   */
  attention: {
    describeGpu(index: number): Promise<GpuDescription>;
    rates(target: AttentionTarget): Promise<AttentionRates>;
    /** The kernel that would run. */
    plan(target: AttentionTarget, problem: AttentionProblem): Promise<string>;
    run(target: AttentionTarget, problem: AttentionProblem, options: AttentionRunOptions): Promise<AttentionOutcome>;
  };
}
