import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { TplaError } from '../errors.js';

/** The parts of `tokenizer_config.json` that matter here; everything is optional there. */
export interface TokenizerConfig {
  bosToken: string | null;
  eosToken: string | null;
  padToken: string | null;
  unkToken: string | null;
  addBosToken: boolean;
  /** Jinja source by name; the unnamed one is `default`. */
  chatTemplates: Map<string, string>;
}

export function readTokenizerConfig(dir: string): TokenizerConfig {
  const config = readOptionalJson(join(dir, 'tokenizer_config.json')) ?? {};
  const specials = readOptionalJson(join(dir, 'special_tokens_map.json')) ?? {};
  const token = (name: string) => tokenText(config[name]) ?? tokenText(specials[name]);
  return {
    bosToken: token('bos_token'),
    eosToken: token('eos_token'),
    padToken: token('pad_token'),
    unkToken: token('unk_token'),
    addBosToken: config.add_bos_token === true,
    chatTemplates: readTemplates(dir, config.chat_template),
  };
}

/** A special token is a string, or an object with its `content`. */
function tokenText(value: unknown): string | null {
  if (typeof value === 'string') return value;
  const content = (value as { content?: unknown } | null | undefined)?.content;
  return typeof content === 'string' ? content : null;
}

/** A file of its own goes before the field, as in transformers. */
function readTemplates(dir: string, field: unknown): Map<string, string> {
  const templates = new Map<string, string>();
  if (typeof field === 'string') templates.set('default', field);
  if (Array.isArray(field)) {
    for (const { name, template } of field as { name?: unknown; template?: unknown }[]) {
      if (typeof name === 'string' && typeof template === 'string') templates.set(name, template);
    }
  }
  const json = readOptionalJson(join(dir, 'chat_template.json'));
  if (typeof json?.chat_template === 'string') templates.set('default', json.chat_template);
  const file = join(dir, 'chat_template.jinja');
  if (existsSync(file)) templates.set('default', readFileSync(file, 'utf8'));
  return templates;
}

export function readOptionalJson(path: string): Record<string, unknown> | null {
  if (!existsSync(path)) return null;
  try {
    const json: unknown = JSON.parse(readFileSync(path, 'utf8'));
    if (json === null || typeof json !== 'object' || Array.isArray(json)) throw new Error('not an object');
    return json as Record<string, unknown>;
  } catch (error) {
    throw new TplaError('CHECKPOINT_INVALID', `${path} is not valid JSON: ${(error as Error).message}`, { cause: error });
  }
}
