import { TplaError } from '../../errors.js';
import type { BenchRow } from './rows.js';

/** Rows of a CSV by column name; the first line names the columns. No quoting: fields hold neither commas nor quotes. */
export function parseCsv(text: string): Record<string, string>[] {
  const [head, ...lines] = text.split(/\r?\n/).filter((line) => line.trim() !== '' && !line.startsWith('#'));
  if (head === undefined) return [];
  const names = head.split(',').map((name) => name.trim());
  return lines.map((line) => {
    const fields = line.split(',');
    return Object.fromEntries(names.map((name, i) => [name, (fields[i] ?? '').trim()]));
  });
}

function integer(record: Record<string, string>, name: string, fallback?: number): number {
  const text = record[name] ?? '';
  if (text === '' && fallback !== undefined) return fallback;
  const value = Number(text);
  if (!Number.isInteger(value) || value < 0) throw new TplaError('USAGE', `column ${name}: expected a whole number, got "${text}"`);
  return value;
}

/** One row of a shape file or of somebody else's times. Columns: latent (512), batch, heads, kv_len or kv_lens (a;b;…), q_tokens (1), ms, gpu. */
export function rowOfRecord(record: Record<string, string>): BenchRow & { gpu: string; ms: number | null } {
  const lens = record.kv_lens ?? '';
  const kvLens = lens === '' ? null : lens.split(';').map((part) => integer({ kv_lens: part }, 'kv_lens'));
  const batch = integer(record, 'batch', kvLens?.length);
  if (kvLens !== null && kvLens.length !== batch) throw new TplaError('USAGE', `column kv_lens: expected ${batch} lengths (column batch), got ${kvLens.length}`);
  return {
    kind: record.kind === 'prefill' ? 'prefill' : 'decode',
    latent: integer(record, 'latent', 512),
    batch,
    heads: integer(record, 'heads'),
    kvLens: kvLens ?? new Array<number>(batch).fill(integer(record, 'kv_len')),
    qTokens: integer(record, 'q_tokens', 1),
    pageSize: integer(record, 'page_size', 64),
    causal: record.causal !== '0' && record.causal !== 'false',
    gpu: record.gpu ?? '',
    ms: record.ms === undefined || record.ms === '' ? null : Number(record.ms),
  };
}
