import { shapeFromFields, type AttentionShape, type ShapeFields } from './shape.js';

/** Batch and KV length of decode workloads that others publish times for. */
const DECODE_SIZES = [[1, 32768], [8, 32768], [32, 4096], [32, 32768], [64, 8192], [128, 4096], [128, 8192]] as const;
const HEADS = [128, 64, 32, 16];
/** ThunderMLA's example of uneven lengths. */
const UNEVEN = '4641;45118;1730;1696';
/** ThunderMLA's batch of random lengths from 256 to 1024, as it was published. */
const RANDOM_64 = '871;568;711;329;617;1015;348;978;543;837;650;1020;924;679;560;497;650;406;381;423;511;423;569;943;645;820;829;883;937;765;711;847;'
  + '722;546;519;279;516;315;664;845;850;546;670;871;527;329;446;764;582;1011;453;655;532;985;1019;810;317;305;949;317;669;768;530;349';

const POD_DECODES = [
  { latent: 512, heads: 16, batch: 128, kv_len: 4096 },
  { latent: 512, heads: 32, batch: 64, kv_len: 8192 },
  { latent: 256, heads: 32, batch: 128, kv_len: 8192 },
  { latent: 256, heads: 32, batch: 32, kv_len: 4096 },
];
/** A chunk of 2K with all heads, a whole 8K prompt and a chunk behind 8K on one of eight ranks. */
const POD_PREFILLS = [
  { prefill_heads: 128, prefill_kv_len: 2048 },
  { prefill_heads: 16, prefill_kv_len: 8192 },
  { prefill_heads: 16, prefill_kv_len: 8192, prefill_q_tokens: 2048 },
];

/** Query tokens on both sides of where the forms change over. */
const CHUNK_SIZES = [16, 64, 128, 192, 256, 512, 1024];

interface Preset {
  summary: string;
  shapes: ShapeFields[];
}

const PRESET_TABLE = {
  flashmla: {
    summary: 'MLA decode (512 + 64) at the sizes of FlashMLA\'s benchmark, with uneven lengths and several query tokens',
    shapes: [
      ...decodeGrid({ latent: 512 }, DECODE_SIZES),
      { latent: 512, heads: 128, kv_lens: UNEVEN, q_tokens: 1 },
      { latent: 512, heads: 128, kv_lens: UNEVEN, q_tokens: 4 },
      { latent: 512, heads: 16, kv_lens: UNEVEN, q_tokens: 1 },
    ],
  },
  thundermla: {
    summary: 'the five workloads of ThunderMLA: 16 heads, uneven lengths, several query tokens',
    shapes: [
      { heads: 16, kv_lens: UNEVEN, q_tokens: 4 },
      { heads: 16, kv_len: 65536, batch: 1, q_tokens: 1 },
      { heads: 16, kv_lens: RANDOM_64, q_tokens: 4 },
      { heads: 16, kv_len: 512, batch: 64, q_tokens: 2 },
      { heads: 16, kv_len: 4096, batch: 132, q_tokens: 4 },
    ],
  },
  tpla: {
    summary: 'TPLA decode: a rank\'s slice of 256 beside the 320 and 288 of a shared subspace and the 128 of four ranks',
    shapes: [
      ...decodeGrid({ latent: 256 }, DECODE_SIZES.filter(([batch, length]) => batch !== 128 || length !== 4096)),
      { latent: 256, heads: 128, kv_lens: UNEVEN, q_tokens: 1 },
      { latent: 256, heads: 16, kv_lens: UNEVEN, q_tokens: 1 },
      ...[320, 288, 128].flatMap((latent) => [128, 16].flatMap((heads) => ([[1, 32768], [128, 8192]] as const).map(([batch, kv_len]) => ({ latent, heads, batch, kv_len })))),
    ],
  },
  gqa: {
    summary: 'decode with ordinary keys and values: 4 and 8 query heads to a KV head, MHA, MQA, head dims 128 and 64, several query tokens',
    shapes: [
      ...[[1, 32768], [8, 32768], [32, 8192], [128, 8192], [128, 1024]].map(([batch, kv_len]) => ({ kind: 'gqa', head_dim: 128, heads: 32, kv_heads: 8, batch, kv_len })),
      { kind: 'gqa', head_dim: 128, heads: 64, kv_heads: 8, batch: 64, kv_len: 8192 },
      { kind: 'gqa', head_dim: 128, heads: 32, kv_heads: 32, batch: 16, kv_len: 8192 },
      { kind: 'gqa', head_dim: 128, heads: 16, kv_heads: 1, batch: 256, kv_len: 8192 },
      { kind: 'gqa', head_dim: 128, heads: 64, kv_heads: 8, batch: 64, kv_len: 8192, q_tokens: 4 },
      { kind: 'gqa', head_dim: 64, heads: 32, kv_heads: 8, batch: 128, kv_len: 8192 },
      { kind: 'gqa', head_dim: 128, heads: 32, kv_heads: 8, batch: 128, kv_len: 8192, page: 16 },
      { kind: 'gqa', head_dim: 128, heads: 32, kv_heads: 8, kv_lens: UNEVEN },
    ],
  },
  variants: {
    summary: 'decode with softcap, sliding window, ALiBi and block masks, each beside the plain shape',
    shapes: [
      { latent: 512, heads: 16, batch: 128, kv_len: 8192 },
      { latent: 512, heads: 128, batch: 128, kv_len: 8192 },
      { latent: 256, heads: 64, batch: 128, kv_len: 8192 },
      { kind: 'gqa', head_dim: 128, heads: 32, kv_heads: 8, batch: 128, kv_len: 8192 },
    ].flatMap((plain) => [{}, { softcap: 30 }, { alibi: true }, { window: 1024 }, { block_mask: '64:0.25' }].map((variant) => ({ ...plain, ...variant }))),
  },
  fp8: {
    summary: 'MLA and TPLA decode over fp8 KV, each shape beside its bf16 form',
    shapes: [512, 256].flatMap((latent) => ['bf16', 'fp8'].flatMap((kv_dtype) => decodeGrid({ latent, kv_dtype }, [[1, 32768], [8, 32768], [32, 32768], [128, 8192]]))),
  },
  prefill: {
    summary: 'un-absorbed prefill, 192/128: whole prompts, a chunk behind a cached prefix, a ragged batch',
    shapes: [
      ...[2048, 4096, 8192, 16384].map((kv_len) => ({ kind: 'prefill', heads: 128, kv_len })),
      { kind: 'prefill', heads: 128, kv_len: 8192, causal: false },
      { kind: 'prefill', heads: 128, kv_len: 16384, q_tokens: 2048 },
      { kind: 'prefill', heads: 128, kv_lens: '4096;1024;2500;300;170;90;2048;3000' },
    ],
  },
  chunk: {
    summary: 'prefill behind cached latents, 16 to 1024 query tokens behind 4K to 32K, one sequence and several, over bf16 and fp8 KV: absorbed and un-absorbed',
    shapes: [
      ...[128, 16].flatMap((heads) => [4096, 16384, 32768].flatMap((cached) => CHUNK_SIZES.map((q_tokens) => chunkBehind(cached, { heads, q_tokens })))),
      ...[64, 192, 256, 512].map((q_tokens) => chunkBehind(16384, { heads: 64, q_tokens })),
      ...[128, 16].flatMap((heads) => [64, 192, 256, 512].map((q_tokens) => chunkBehind(16384, { heads, q_tokens, kv_dtype: 'fp8' }))),
      ...[128, 16].flatMap((heads) => [64, 256].map((q_tokens) => chunkBehind(8192, { heads, q_tokens, batch: 4 }))),
      { kind: 'chunk', heads: 128, kv_lens: '9000;700;4300;33000', q_lens: '120;700;300;90' },
    ],
  },
  pod: {
    summary: 'prefill and decode of one step in one launch, beside the two launches: chunks of 2K to 8K with 16 and 128 heads, 32 to 128 sequences',
    shapes: POD_DECODES.flatMap((decode) => POD_PREFILLS.map((prefill) => ({ kind: 'pod', ...decode, ...prefill }))),
  },
} satisfies Record<string, Preset>;

export type PresetName = keyof typeof PRESET_TABLE;

export const PRESETS: Record<PresetName, Preset> = PRESET_TABLE;

export function presetShapes(name: PresetName): AttentionShape[] {
  return PRESETS[name].shapes.map((fields, i) => shapeFromFields(fields, `preset ${name}, shape ${i + 1}`));
}

function chunkBehind(cached: number, fields: ShapeFields & { q_tokens: number }): ShapeFields {
  return { kind: 'chunk', kv_len: cached + fields.q_tokens, ...fields };
}

function decodeGrid(fields: ShapeFields, sizes: readonly (readonly [number, number])[]): ShapeFields[] {
  return HEADS.flatMap((heads) => sizes.map(([batch, kv_len]) => ({ ...fields, heads, batch, kv_len })));
}
