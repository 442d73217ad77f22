/** Sums over scored positions; `summary()` turns them into what people compare. */
export class Score {
  #tokens = 0;
  #bytes = 0;
  #nats = 0;
  #divergence = 0;
  #agreed = 0;

  /** One position: logits, those of exact MLA, the token that really comes next and how many bytes of text it stands for. */
  add(logits: Float32Array, exact: Float32Array, next: number, bytes: number): void {
    const [own, reference] = [logSumExp(logits), logSumExp(exact)];
    let divergence = 0;
    for (let i = 0; i < exact.length; i++) {
      const log = exact[i]! - reference;
      divergence += Math.exp(log) * (log - (logits[i]! - own));
    }
    this.#tokens++;
    this.#bytes += bytes;
    this.#nats += own - logits[next]!;
    this.#divergence += divergence;
    if (argmax(logits) === argmax(exact)) this.#agreed++;
  }

  summary(): Summary {
    const tokens = Math.max(1, this.#tokens);
    return {
      bits_per_byte: this.#nats / Math.LN2 / Math.max(1, this.#bytes),
      kl_vs_mla: this.#divergence / tokens,
      top1_agreement: this.#agreed / tokens,
      tokens: this.#tokens,
    };
  }
}

export interface Summary {
  bits_per_byte: number;
  /** Mean KL(exact MLA ‖ this form) per token, in nats. */
  kl_vs_mla: number;
  /** Share of positions where both would choose the same token. */
  top1_agreement: number;
  /** Scored positions. */
  tokens: number;
}

export function argmax(values: Float32Array): number {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i]! > values[best]!) best = i;
  return best;
}

function logSumExp(values: Float32Array): number {
  let top = -Infinity;
  for (let i = 0; i < values.length; i++) if (values[i]! > top) top = values[i]!;
  let sum = 0;
  for (let i = 0; i < values.length; i++) sum += Math.exp(values[i]! - top);
  return top + Math.log(sum);
}
