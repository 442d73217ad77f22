import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { Args, Flags } from '@oclif/core';
import { BaseCommand } from '../cli/base_command.js';
import { evaluateText, type TextEvaluation } from '../eval/command.js';
import { TplaError } from '../errors.js';
import type { KvDType, KvForm } from '../native/types.js';
import { table } from '../report/table.js';

export default class Eval extends BaseCommand {
  static override summary = 'Measure a checkpoint on a text: bits per byte, KL to exact MLA, top-1 agreement';
  static override description = `Windows of the text are scored from their middle on. \`--phase decode\` prefills the first half of a window exactly and decodes the
rest token by token, fed with the text itself: it measures what decode computes in the chosen attention form, which perplexity through
prefill never shows. KL is taken against the exact prefill of the same checkpoint, or of the one that --reference names.`;
  static override examples = [
    '<%= config.bin %> <%= command.id %> models/demo',
    '<%= config.bin %> <%= command.id %> models/demo-tpla --phase decode --attention tpla --reference models/demo --json',
    '<%= config.bin %> <%= command.id %> models/demo --phase decode --attention dcp --ranks 4 --text notes.txt --tokens 4096',
  ];
  static override enableJsonFlag = true;
  static override args = { model: Args.string({ description: 'checkpoint directory', required: true }) };
  static override flags = {
    text: Flags.string({ description: 'UTF-8 text to score; default heldout.txt of the checkpoint' }),
    phase: Flags.string({ options: ['prefill', 'decode'], default: 'decode', description: 'which path computes the scored logits' }),
    attention: Flags.string({ options: ['mla', 'tpla', 'dcp', 'dp'], description: 'attention form of decode; default tpla for a reparameterised checkpoint, else mla' }),
    ranks: Flags.integer({ min: 1, max: 64, aliases: ['groups'], description: 'decode ranks; default the groups of a reparameterised checkpoint with tpla, else 1 (mla) or 2' }),
    reference: Flags.string({ description: 'checkpoint whose exact MLA is compared with; default the model itself' }),
    context: Flags.integer({ min: 8, description: 'tokens per window; default 1024, or the whole context of a model with less' }),
    prefix: Flags.integer({ min: 1, description: 'tokens of a window that are context only; default half' }),
    tokens: Flags.integer({ min: 1, default: 4096, description: 'scored tokens wanted' }),
    seed: Flags.integer({ min: 0, default: 1, description: 'which windows of a longer text are scored' }),
    'kv-dtype': Flags.string({ options: ['f32', 'bf16', 'fp8'], default: 'bf16', description: 'what caches hold' }),
    threads: Flags.integer({ min: 0, default: 0, description: 'compute threads; 0 for all cores' }),
  };

  async run(): Promise<TextEvaluation> {
    const { args, flags } = await this.parse(Eval);
    const text = flags.text ?? join(args.model, 'heldout.txt');
    if (!existsSync(text)) throw new TplaError('USAGE', flags.text === undefined ? `${args.model} has no heldout.txt; name a text with --text FILE` : `text ${text}: no such file`);
    const result = await evaluateText({
      model: args.model, text, reference: flags.reference, phase: flags.phase as 'prefill' | 'decode', attention: flags.attention as KvForm | undefined, ranks: flags.ranks,
      context: flags.context, prefix: flags.prefix, tokens: flags.tokens, seed: flags.seed, dtype: flags['kv-dtype'] as KvDType, threads: flags.threads,
      quiet: this.jsonEnabled(),
    });
    this.log(table(['phase', 'attention', 'ranks', 'bits/byte', 'KL to MLA, nats', 'top-1', 'tokens', 'KV B/token/rank'], [[
      result.phase, result.attention, String(result.ranks), result.bits_per_byte.toFixed(4), result.kl_vs_mla.toExponential(3), `${(100 * result.top1_agreement).toFixed(2)} %`,
      String(result.tokens), String(result.kv_bytes_per_token_per_rank)]]));
    return result;
  }
}
