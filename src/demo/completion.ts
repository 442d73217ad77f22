import { WorkerClient } from '../http/client.js';
import type { Completion, TplaTimings, Usage } from '../http/openai_types.js';
import { TplaError } from '../errors.js';
import { DEMO_SAMPLING } from './prompt.js';

export interface DemoRequest {
  prompt: string;
  maxTokens: number;
}

export interface DemoCompletion {
  text: string;
  usage: Usage;
  timings: TplaTimings;
}

/** Streams one completion through route; `onText` gets the text as it comes. */
export async function streamCompletion(route: string, request: DemoRequest, onText: (text: string) => void, signal: AbortSignal): Promise<DemoCompletion> {
  const client = new WorkerClient(route);
  const body = {
    model: 'demo', prompt: request.prompt, max_tokens: request.maxTokens, ...DEMO_SAMPLING,
    stream: true, stream_options: { include_usage: true }, tpla_timings: true,
  };
  let text = '';
  let usage: Usage | null | undefined;
  let timings: TplaTimings | undefined;
  try {
    for await (const chunk of client.events<Completion>('/v1/completions', body, signal)) {
      const piece = chunk.choices[0]?.text ?? '';
      if (piece !== '') onText(piece);
      text += piece;
      usage = chunk.usage ?? usage;
      timings = chunk.tpla ?? timings;
    }
  } finally {
    await client.close();
  }
  if (!usage || !timings) throw new TplaError('PROTOCOL', `${route} sent no usage or timings although both were asked for`);
  return { text, usage, timings };
}
