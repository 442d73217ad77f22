/**
 * Content ids of token blocks: the name under which a block of KV is cached, looked up and placed anywhere in the fleet.
 *
 * id(block) = sha-256(domain ‖ id(parent) ‖ tokens as uint32 LE), cut to 128 bits. The parent of the first block is the hash of
 * everything else that decides the bytes of the KV: model fingerprint, latent basis, dtype, block size and a salt. No seed and no
 * process state enter, so every process computes the same ids; an id stands for the whole prefix that ends with its block, and whoever
 * knows it can extend the chain. The served name stays out: it does not change a byte.
 */
import { createHash } from 'node:crypto';
import { TplaError } from '../errors.js';
import type { ModelIdentity } from '../model/spec.js';
import type { KvDType } from '../native/types.js';

export interface BlockHashOptions {
  dtype: KvDType;
  /** Tokens per block. */
  pageTokens: number;
  /** Keeps tenants from sharing (and from probing) one another's cache; '' shares. */
  salt: string;
}

/** Ids are 32 hexadecimal digits. */
const ID_BYTES = 16;
const ROOT_DOMAIN = 'tpla/kv-root/1\0';
const BLOCK_DOMAIN = Buffer.from('tpla/kv-block/1\0', 'latin1');
const TOKENS_AT = BLOCK_DOMAIN.length + ID_BYTES;

/** Ids of the full blocks of `tokens`, in order; a last partial block has none. */
export function blockIds(tokens: ArrayLike<number>, identity: ModelIdentity, options: BlockHashOptions): string[] {
  return new BlockChain(identity, options).append(tokens);
}

/** Block ids of a sequence that grows. */
export class BlockChain {
  readonly pageTokens: number;
  readonly #ids: string[] = [];
  /** What is hashed next: domain, parent id, tokens of the open block. */
  readonly #block: Buffer;
  #open = 0;

  constructor(identity: ModelIdentity, { dtype, pageTokens, salt }: BlockHashOptions) {
    if (!Number.isInteger(pageTokens) || pageTokens < 1) {
      throw new TplaError('INTERNAL', `a block has a whole number of tokens, at least 1; got ${pageTokens}`);
    }
    this.pageTokens = pageTokens;
    this.#block = Buffer.alloc(TOKENS_AT + 4 * pageTokens);
    BLOCK_DOMAIN.copy(this.#block);
    rootId([identity.fingerprint, identity.reparam, dtype, String(pageTokens), salt]).copy(this.#block, BLOCK_DOMAIN.length);
  }

  /** Ids of all full blocks so far. */
  get ids(): readonly string[] {
    return this.#ids;
  }

  /** Tokens so far, those of the open block included. */
  get length(): number {
    return this.#ids.length * this.pageTokens + this.#open;
  }

  /** Adds tokens; returns the ids of the blocks they completed. */
  append(tokens: ArrayLike<number>): string[] {
    const before = this.#ids.length;
    for (let i = 0; i < tokens.length; i++) this.push(tokens[i]!);
    return this.#ids.slice(before);
  }

  /** Adds one token; returns the id of the block it completed, if it did. */
  push(token: number): string | undefined {
    if (!Number.isInteger(token) || token < 0 || token > 0xffffffff) {
      throw new TplaError('INTERNAL', `a token id is a whole number in [0, 2^32); got ${token} at position ${this.length}`);
    }
    this.#block.writeUInt32LE(token, TOKENS_AT + 4 * this.#open++);
    if (this.#open < this.pageTokens) return undefined;
    const digest = createHash('sha256').update(this.#block).digest().subarray(0, ID_BYTES);
    digest.copy(this.#block, BLOCK_DOMAIN.length);
    this.#open = 0;
    const id = digest.toString('hex');
    this.#ids.push(id);
    return id;
  }
}

/** Fields are length-prefixed, so that no two lists of fields give the same text. */
function rootId(fields: string[]): Buffer {
  const hash = createHash('sha256').update(ROOT_DOMAIN, 'latin1');
  for (const field of fields) {
    const bytes = Buffer.from(field, 'utf8');
    const length = Buffer.alloc(4);
    length.writeUInt32LE(bytes.length);
    hash.update(length).update(bytes);
  }
  return hash.digest().subarray(0, ID_BYTES);
}
