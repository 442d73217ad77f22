import { readFileSync } from 'node:fs';
import { TplaError } from '../errors.js';
import type { Tokenizer } from '../model/tokenizer.js';
import { uniform } from '../random.js';

/** A text with a fact planted in it and, at its end, the question and the value that was planted. */
export interface RecallPrompt {
  tokens: Int32Array;
  /** Tokens before the question: what prefill computes. */
  prefix: number;
  /** First token of the value. */
  answer: number;
  /** Length aimed at, in tokens, and where in the text the fact stands: 0 the beginning, 1 the end. */
  context: number;
  depth: number;
}

export interface RecallPlan {
  contexts: number[];
  depths: number[];
  perCell: number;
  seed: number;
}

const ATTRIBUTES = ['access code', 'serial number', 'port number', 'inventory number', 'room number', 'magic number'];
const ADJECTIVES = ['amber', 'brass', 'copper', 'crimson', 'eastern', 'granite', 'hollow', 'ivory', 'northern', 'silver', 'southern', 'velvet'];
const NOUNS = ['archive', 'beacon', 'bridge', 'cluster', 'engine', 'gateway', 'harbour', 'library', 'observatory', 'printer', 'station', 'turbine'];
const DISTRACTORS = 2;

/** Plants facts into stretches of `text`, `perCell` prompts for each context length and depth. */
export async function plantFacts(tokenizer: Tokenizer, text: string, plan: RecallPlan): Promise<RecallPrompt[]> {
  const random = uniform(plan.seed);
  const below = (count: number) => Math.floor(random() * count);
  const paragraphs = text.split(/\n\s*\n/).map((paragraph) => paragraph.trim()).filter((paragraph) => paragraph.length > 0);
  const lengths = await Promise.all(paragraphs.map(async (paragraph) => (await tokenizer.encode(`${paragraph}\n\n`, { addSpecialTokens: false })).length));
  const prompts: RecallPrompt[] = [];
  for (const context of plan.contexts) {
    for (const depth of plan.depths) {
      for (let i = 0; i < plan.perCell; i++) {
        const facts = distinctFacts(DISTRACTORS + 1, below);
        const body = stretch(paragraphs, lengths, below(paragraphs.length), context - 40 * (DISTRACTORS + 1));
        const [asked, ...others] = facts as [Fact, ...Fact[]];
        for (const fact of others) body.splice(below(body.length + 1), 0, sentence(fact));
        body.splice(boundaryNear(body, depth), 0, sentence(asked));
        prompts.push(await tokenise(tokenizer, `${body.join('\n\n')}\n\n`, `What is the ${asked.attribute} of the ${asked.entity}? ${statement(asked)}`, asked.value, { context, depth }));
      }
    }
  }
  return prompts;
}

/** A file of JSON lines {prompt, answer, depth, context_tokens}: the prompt ends right before the value, its last paragraph is the question. */
export async function readRecallFile(tokenizer: Tokenizer, path: string): Promise<RecallPrompt[]> {
  const lines = readFileSync(path, 'utf8').split('\n').filter((line) => line.trim() !== '');
  return Promise.all(lines.map(async (line, index) => {
    let record: { prompt?: unknown; answer?: unknown; depth?: unknown; context_tokens?: unknown };
    try {
      record = JSON.parse(line) as typeof record;
    } catch (error) {
      throw new TplaError('REQUEST_INVALID', `${path}: line ${index + 1} is not JSON`, { cause: error });
    }
    const { prompt, answer } = record;
    if (typeof prompt !== 'string' || typeof answer !== 'string') throw new TplaError('REQUEST_INVALID', `${path}: line ${index + 1} has no prompt and answer`);
    const cut = prompt.lastIndexOf('\n\n') + 2;
    const context = Number(record.context_tokens ?? 0);
    return tokenise(tokenizer, prompt.slice(0, cut), prompt.slice(cut), answer, { context: Math.round(context / 256) * 256, depth: Number(record.depth ?? 0) });
  }));
}

async function tokenise(tokenizer: Tokenizer, body: string, question: string, value: string, cell: { context: number; depth: number }): Promise<RecallPrompt> {
  const encode = (text: string) => tokenizer.encode(text, { addSpecialTokens: false });
  const begin = tokenizer.bosTokenId === null ? [] : [tokenizer.bosTokenId];
  const [prefix, asked, answer] = await Promise.all([encode(body), encode(question), encode(` ${value}`)]);
  const head = begin.length + prefix.length;
  return { tokens: Int32Array.from([...begin, ...prefix, ...asked, ...answer]), prefix: head, answer: head + asked.length, ...cell };
}

interface Fact {
  attribute: string;
  entity: string;
  value: string;
}

function statement({ attribute, entity }: Fact): string {
  return `The ${attribute} of the ${entity} is`;
}

function sentence(fact: Fact): string {
  return `${statement(fact)} ${fact.value}.`;
}

/** Index of the paragraph boundary that is nearest to a part of the text. */
function boundaryNear(paragraphs: string[], part: number): number {
  const ends = paragraphs.reduce((sums, paragraph) => [...sums, sums[sums.length - 1]! + paragraph.length], [0]);
  const wanted = part * ends[ends.length - 1]!;
  return ends.reduce((best, end, index) => (Math.abs(end - wanted) < Math.abs(ends[best]! - wanted) ? index : best), 0);
}

function distinctFacts(count: number, below: (count: number) => number): Fact[] {
  const facts = new Map<string, Fact>();
  while (facts.size < count) {
    const attribute = ATTRIBUTES[below(ATTRIBUTES.length)]!;
    const entity = `${ADJECTIVES[below(ADJECTIVES.length)]} ${NOUNS[below(NOUNS.length)]}`;
    facts.set(`${attribute} ${entity}`, { attribute, entity, value: String(10000 + below(90000)) });
  }
  return [...facts.values()];
}

/** Consecutive paragraphs from `first` on, around to the beginning, of about `tokens` tokens. */
function stretch(paragraphs: string[], lengths: number[], first: number, tokens: number): string[] {
  const body: string[] = [];
  for (let i = 0, length = 0; i < paragraphs.length && length < tokens; i++) {
    const at = (first + i) % paragraphs.length;
    if (length + lengths[at]! > tokens && length > tokens / 2) continue;
    body.push(paragraphs[at]!);
    length += lengths[at]!;
  }
  return body;
}
