import { table } from '../report/table.js';
import type { Report } from './report.js';

export function printReport({ rows, groups, best_pca: best, picture, reference_bits_per_byte: reference }: Report): string {
  const lines = rows.map((row) => [
    row.name, row.kv_bytes_per_token_per_rank, row.bits_per_byte.toFixed(4), row.kl_vs_mla < 1e-4 ? row.kl_vs_mla.toExponential(1) : row.kl_vs_mla.toFixed(5),
    row.kl_vs_best_pca === null ? '' : row.kl_vs_best_pca.toFixed(3), `${(100 * row.top1_agreement).toFixed(2)} %`,
    row.recall_accuracy === null ? '' : `${(100 * row.recall_accuracy).toFixed(1)} %`,
  ]);
  const head = ['method', 'B/token/rank', 'bits/byte', 'KL, nats', 'of best PCA', 'top-1', 'recall'];
  return [
    table(head, lines, ['left', 'right', 'right', 'right', 'right', 'right', 'right']),
    '',
    `${groups} ranks; decode path after exact prefill, whose bits per byte are ${reference.toFixed(4)}.`,
    ...(best === null ? [] : [`best single scale: ${best.name}, KL ${best.kl_vs_mla.toFixed(5)}`]),
    ...rows.flatMap(({ name, shared }) => (shared === null || typeof shared === 'number' ? [] : [`${name}: ${shared.join(', ')}`])),
    ...(picture === null ? [] : [`picture: ${picture}`]),
  ].join('\n');
}
