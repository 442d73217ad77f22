/** Sends the text of a request, whole or as a stream. */
import type { FastifyReply } from 'fastify';
import { TplaError, toTplaError } from '../../errors.js';
import type { TextRequest } from '../../http/openai_request.js';
import type { FinishedChoice, ResponseEnd, ResponseFormat } from '../../http/openai_response.js';
import { eventStream } from '../../http/sse.js';
import type { TextEvent } from './text_generation.js';

/** How an answer that had begun went out. */
export interface Outcome {
  end: ResponseEnd | null;
  /** What broke it off. */
  error: TplaError | null;
}

export async function answerWhole(reply: FastifyReply, events: AsyncGenerator<TextEvent>, format: ResponseFormat, { n, timings }: TextRequest, prompts: number): Promise<Outcome> {
  const choices: FinishedChoice[] = Array.from({ length: n * prompts }, (_, index) => emptyChoice(index));
  for await (const event of events) {
    if (event.event === 'end') {
      const end = { usage: event.usage, timings: timings ? event.timings : null };
      void reply.send(format.whole(choices, end));
      return { end, error: null };
    }
    collect(choices, event);
  }
  throw new TplaError('INTERNAL', 'a generation ended without its last event');
}

function collect(choices: FinishedChoice[], event: Exclude<TextEvent, { event: 'end' }>): void {
  if (event.event === 'restart') {
    for (let index = event.begin; index < event.end; index++) choices[index] = emptyChoice(index);
    return;
  }
  const choice = choices[event.index]!;
  if (event.event === 'finish') {
    choice.reason = event.reason;
    return;
  }
  choice.text += event.text;
  choice.tokens.push(...event.tokens);
}

function emptyChoice(index: number): FinishedChoice {
  return { index, text: '', tokens: [], reason: 'stop' };
}

/** The response begins with the first piece of text: whatever fails before is an HTTP error with its status. */
export async function answerStream(reply: FastifyReply, id: string, events: AsyncGenerator<TextEvent>, format: ResponseFormat, request: TextRequest, signal: AbortSignal): Promise<Outcome> {
  let step = await events.next();
  const stream = eventStream(reply, signal, { 'x-request-id': id });
  const opened = new Set<number>();
  let end: ResponseEnd | null = null;
  try {
    for (; !step.done; step = await events.next()) {
      if (step.value.event === 'end') end = { usage: step.value.usage, timings: request.timings ? step.value.timings : null };
      for (const chunk of chunks(step.value, format, request, opened)) await stream.write(chunk);
    }
    stream.done();
    return { end, error: null };
  } catch (thrown) {
    const error = toTplaError(thrown);
    stream.fail(error);
    return { end, error };
  }
}

function* chunks(event: TextEvent, format: ResponseFormat, { timings, sampling }: TextRequest, opened: Set<number>): Generator<unknown> {
  if (event.event === 'restart') throw new TplaError('INTERNAL', 'a generation began anew after its text was sent');
  if (event.event === 'end') {
    const last = format.end({ usage: event.usage, timings: timings ? event.timings : null });
    if (last) yield last;
    return;
  }
  if (!opened.has(event.index)) {
    opened.add(event.index);
    const first = format.open(event.index);
    if (first) yield first;
  }
  if (event.event === 'finish') yield format.finish(event.index, event.reason);
  else if (event.text !== '' || sampling.logprobs >= 0) yield format.piece(event.index, event);
}
