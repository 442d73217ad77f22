const UNITS: Record<string, number> = {
  B: 1,
  KB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12,
  KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, TiB: 2 ** 40,
};

/** Bytes written as `4096`, `512MiB`, `1.5 GB`; null where the text is none of these. KB is 1e3, KiB is 2^10. */
export function parseBytes(text: string): number | null {
  const match = /^(\d+(?:\.\d+)?) *([A-Za-z]*)$/.exec(text.trim());
  if (!match) return null;
  const unit = match[2] === '' ? 1 : UNITS[match[2] as string];
  if (unit === undefined) return null;
  const bytes = Math.round(Number(match[1]) * unit);
  return Number.isSafeInteger(bytes) ? bytes : null;
}

/** Largest binary unit that leaves at least 1, two decimals where it is not whole. */
export function formatBytes(bytes: number): string {
  for (const unit of ['TiB', 'GiB', 'MiB', 'KiB'] as const) {
    const scale = UNITS[unit] as number;
    if (bytes >= scale) return `${trimZeros(bytes / scale)} ${unit}`;
  }
  return `${bytes} B`;
}

function trimZeros(value: number): string {
  return value.toFixed(2).replace(/\.?0+$/, '');
}
