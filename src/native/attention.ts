/** The part of the addon that checks and times attention kernels on a GPU; see native/cuda/attention_bench.h. */

export type KernelPath = 'auto' | 'sm90' | 'sm80';

export interface DecodeCase {
  kind: 'decode';
  /** Width of the cached latent; a token adds 64 rope values. */
  latent: number;
  heads: number;
  /** Query tokens per sequence. */
  qTokens: number;
  pageSize: number;
  /** Cached tokens of each sequence. */
  kvLens: Int32Array;
  causal: boolean;
  path: KernelPath;
}

export interface PrefillCase {
  kind: 'prefill';
  heads: number;
  qLens: Int32Array;
  kvLens: Int32Array;
  causal: boolean;
}

export type AttentionCase = DecodeCase | PrefillCase;

export interface Verdict {
  name: string;
  ok: boolean;
  /** Worst row of ‖out − reference‖ / ‖reference‖ against float64; NaN where an output was not written. */
  error: number;
  lseError: number;
  /** Whether every repeat gave the same bits. */
  sameBits: boolean;
}

export interface Timing {
  /** Median of graph replays; buffers rotate beyond L2. */
  ms: number;
  /** Each input read once, each output written once. */
  bytes: number;
  flops: number;
}

export interface MachineRates {
  name: string;
  /** Device to device, read + written. */
  copyBytesPerSecond: number;
  /** Dense bf16 matrix product. */
  matrixFlopsPerSecond: number;
}

export type AttentionRequest =
  | { operation: 'machine' }
  | ({ operation: 'check'; repeats: number; seed: number } & AttentionCase)
  | ({ operation: 'time'; seed: number } & AttentionCase)
  | { operation: 'checkRandom'; kind: 'decode'; path: KernelPath; repeats: number; seed: number }
  | { operation: 'checkRandom'; kind: 'prefill'; repeats: number; seed: number };

export interface AttentionModule {
  /** Throws GPU_UNAVAILABLE in an addon built without CUDA, REQUEST_INVALID for shapes no kernel takes. */
  benchAttention(request: { operation: 'machine' }): Promise<MachineRates>;
  benchAttention(request: Extract<AttentionRequest, { operation: 'check' | 'checkRandom' }>): Promise<Verdict>;
  benchAttention(request: Extract<AttentionRequest, { operation: 'time' }>): Promise<Timing>;
}
