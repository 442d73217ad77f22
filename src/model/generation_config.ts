import { join } from 'node:path';
import { readOptionalJson } from './tokenizer_config.js';

/** Sampling defaults the model's authors recommend; null where they say nothing. */
export interface GenerationConfig {
  eosTokenIds: number[];
  temperature: number | null;
  topP: number | null;
  topK: number | null;
  minP: number | null;
  repetitionPenalty: number | null;
}

/** `generation_config.json`; `do_sample: false` means greedy. All null without the file. */
export function loadGenerationConfig(dir: string): GenerationConfig {
  const json = readOptionalJson(join(dir, 'generation_config.json')) ?? {};
  const number = (name: string) => (typeof json[name] === 'number' ? (json[name] as number) : null);
  const eos = Array.isArray(json.eos_token_id) ? json.eos_token_id : [json.eos_token_id];
  return {
    eosTokenIds: eos.filter((id): id is number => Number.isInteger(id)),
    temperature: json.do_sample === false ? 0 : number('temperature'),
    topP: number('top_p'),
    topK: number('top_k'),
    minP: number('min_p'),
    repetitionPenalty: number('repetition_penalty'),
  };
}
