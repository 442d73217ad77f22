/** Writes the tables of README.md that follow from the code: `npx tsx scripts/readme_tables.ts`. A test holds the file to them. */
import { readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { ROLE_SCHEMAS } from '../src/config/load.js';
import { formatBytes } from '../src/config/bytes.js';
import type { Schema } from '../src/config/schemas/schema.js';
import { settingsOf, type Setting } from '../src/config/settings.js';
import { ERRORS, type ErrorCode } from '../src/errors.js';

export const README = fileURLToPath(new URL('../README.md', import.meta.url));

/** The text with every table between its markers as the code has it now. */
export async function withTables(text: string): Promise<string> {
  const tables: Record<string, string> = { commands: await commandTable(), configuration: configurationTable(), 'exit statuses': exitTable() };
  return Object.entries(tables).reduce((result, [name, table]) => {
    const marked = new RegExp(`(<!-- ${name} -->\n)[^]*?(<!-- end -->)`);
    if (!marked.test(result)) throw new Error(`README.md has no "<!-- ${name} -->" … "<!-- end -->"`);
    return result.replace(marked, (_all, begin: string, end: string) => `${begin}${table}\n${end}`);
  }, text);
}

async function commandTable(): Promise<string> {
  const files = readdirSync(new URL('../src/commands/', import.meta.url)).sort();
  const lines = await Promise.all(files.map(async (file) => {
    const { default: command } = await import(`../src/commands/${file}`) as { default: { summary: string } };
    return `| \`tpla ${file.replace(/\.ts$/, '')}\` | ${command.summary} |`;
  }));
  return ['| command | |', '|---|---|', ...lines, '| `tpla autocomplete` | Shell completion for bash, zsh and PowerShell |'].join('\n');
}

function configurationTable(): string {
  const roles = Object.entries(ROLE_SCHEMAS);
  const rows = new Map<string, { setting: Setting; roles: string[]; defaults: Set<string> }>();
  for (const [role, schema] of roles) {
    for (const setting of settingsOf(schema)) {
      const key = setting.path.join('.');
      const row = rows.get(key) ?? { setting, roles: [], defaults: new Set() };
      row.roles.push(role);
      row.defaults.add(shownDefault(setting.schema));
      rows.set(key, row);
    }
  }
  const lines = [...rows].map(([key, { setting, roles: of, defaults }]) => (
    `| \`${key}\` | \`--${setting.flag}\` | ${of.length === roles.length ? 'all' : of.join(', ')} | ${allowed(setting.schema)} | ${[...defaults].join(' / ')} | ${of.length > 1 ? general(setting.schema.description) : setting.schema.description} |`
  ));
  return ['| key | flag | roles | value | default | meaning |', '|---|---|---|---|---|---|', ...lines].join('\n');
}

/** `listen` means something else in each role; the first sentence holds for all. */
function general(description: string): string {
  return description.replace(/^Address of the \w+: /, 'Where it serves: ');
}

function allowed(schema: Schema): string {
  if (schema.enum) return schema.enum.map((value) => `\`${value}\``).join(', ');
  if (schema.bytes) return 'size';
  if (schema.type === 'array') return 'addresses';
  if (schema.address) return 'address';
  if (schema.path) return 'directory';
  if (schema.type !== 'integer') return 'text';
  const multiple = schema.multipleOf === undefined ? '' : `, multiple of ${schema.multipleOf}`;
  return schema.maximum === undefined ? `≥ ${schema.minimum}${multiple}` : `${schema.minimum} … ${schema.maximum}${multiple}`;
}

function shownDefault(schema: Schema): string {
  if (schema.default === undefined) return '';
  if (schema.default === null) return 'none';
  if (schema.bytes) return `\`${formatBytes(schema.default as number).replace(' ', '')}\``;
  return `\`${String(schema.default)}\``;
}

const MEANING: Record<number, string> = {
  0: 'done; for a role: told to stop, and everything had drained',
  1: 'attention results that differ from the float64 reference',
  2: 'wrong command line or request',
  65: 'model files that are damaged or not supported, or data that failed its checksum',
  69: 'something needed is not there: the addon, a GPU, a worker',
  70: 'a fault in tpla',
  71: 'no memory',
  73: 'socket or port in use',
  74: 'input or output failed',
  75: 'busy; try again',
  76: 'the other side speaks another protocol or has another model',
  78: 'wrong configuration',
  129: '`tpla up` died, so its service ended',
  130: 'SIGINT before the end, or before requests had drained',
  143: 'SIGTERM before requests had drained',
};

function exitTable(): string {
  const codes = (status: number) => (Object.keys(ERRORS) as ErrorCode[]).filter((code) => ERRORS[code].exit === status).map((code) => `\`${code}\``).join(', ');
  const unexplained = Object.values(ERRORS).find(({ exit }) => MEANING[exit] === undefined);
  if (unexplained) throw new Error(`exit status ${unexplained.exit} has no meaning in scripts/readme_tables.ts`);
  const lines = Object.entries(MEANING).map(([status, meaning]) => `| ${status} | ${meaning} | ${codes(Number(status))} |`);
  return ['| status | meaning | codes |', '|---|---|---|', ...lines].join('\n');
}

if (process.argv[1] === fileURLToPath(import.meta.url)) writeFileSync(README, await withTables(readFileSync(README, 'utf8')));
