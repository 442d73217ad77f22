import { randomUUID } from 'node:crypto';
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify';
import { TplaError, toTplaError } from '../../errors.js';
import { invalid } from '../../http/fields.js';
import type { ModelCard } from '../../http/openai_types.js';
import { readChat, readCompletion, readDetokenize, readTokenize, type TextRequest } from '../../http/openai_request.js';
import { chatFormat, completionFormat, type FinishedChoice, type ResponseEnd, type ResponseFormat, type ResponseOptions } from '../../http/openai_response.js';
import { eventStream } from '../../http/sse.js';
import { Lifetime } from './lifetime.js';
import { prepareChat, prepareCompletion, type Prepared } from './prompts.js';
import type { Outcome, Router } from './router.js';
import { generateText, type TextEvent } from './text_generation.js';

const TIMINGS_HEADER = 'x-tpla-timings';

/** An endpoint that generates text: how it reads a request, makes tokens of it, and shapes the answer. */
interface TextEndpoint<T extends TextRequest> {
  path: string;
  idPrefix: string;
  read(body: unknown, limits: Router['limits']): T;
  prepare(request: T, model: Router['model'], contextLength: number): Promise<Prepared>;
  format(options: ResponseOptions): ResponseFormat;
}

export function addOpenAiEndpoints(app: FastifyInstance, router: Router): void {
  addTextEndpoint(app, router, { path: '/v1/completions', idPrefix: 'cmpl-', read: readCompletion, prepare: prepareCompletion, format: completionFormat });
  addTextEndpoint(app, router, { path: '/v1/chat/completions', idPrefix: 'chatcmpl-', read: readChat, prepare: prepareChat, format: chatFormat });

  app.get('/v1/models', () => ({ object: 'list', data: [modelCard(router)] }));
  app.get<{ Params: { '*': string } }>('/v1/models/*', (request) => {
    const id = request.params['*'];
    if (id !== router.model.name) throw new TplaError('MODEL_NOT_FOUND', `the model "${id}" is not served here; GET /v1/models lists what is`, { param: 'model' });
    return modelCard(router);
  });

  app.post('/tokenize', async ({ body }) => {
    const { input, addSpecialTokens, addGenerationPrompt, tokenStrings } = readTokenize(body, router.limits);
    const { model } = router;
    const tokens = 'prompt' in input
      ? await model.tokenizer.encode(input.prompt, { addSpecialTokens: addSpecialTokens ?? true })
      : await model.tokenizer.encode(model.renderChat(input.messages, { addGenerationPrompt, variables: input.templateVariables }), { addSpecialTokens: addSpecialTokens ?? false });
    const strings = tokenStrings ? { token_strs: tokens.map((token) => model.tokenizer.decode([token], { skipSpecialTokens: false })) } : {};
    return { tokens, count: tokens.length, max_model_len: router.contextLength, ...strings };
  });
  app.post('/detokenize', ({ body }) => {
    const { tokens } = readDetokenize(body, router.limits);
    return { prompt: router.model.tokenizer.decode(tokens, { skipSpecialTokens: false }) };
  });
}

function modelCard({ model, contextLength }: Router): ModelCard {
  return { id: model.name, object: 'model', created: model.created, owned_by: 'tpla', max_model_len: contextLength };
}

function addTextEndpoint<T extends TextRequest>(app: FastifyInstance, router: Router, endpoint: TextEndpoint<T>): void {
  app.post(endpoint.path, async (request, reply) => {
    const arrivedAt = router.clock.now();
    router.refuseWhenDraining();
    const parsed = endpoint.read(request.body, router.limits);
    if (wantsTimings(request)) parsed.timings = true;
    const lifetime = new Lifetime(reply, router.requestTimeoutMs);
    const done = router.begin(lifetime);
    try {
      const { prompts, maxTokens } = await endpoint.prepare(parsed, router.model, router.contextLength);
      if (parsed.timings && prompts.length > 1) throw invalid('tpla_timings', `tpla_timings needs a request of one prompt; got ${prompts.length}`);
      const id = `${endpoint.idPrefix}${randomUUID().replaceAll('-', '')}`;
      void reply.header('x-request-id', id);
      const events = generateText({ id, arrivedAt, prompts, request: parsed, maxTokens }, router.textContext, lifetime.signal);
      const format = endpoint.format({
        id,
        created: Math.floor(Date.now() / 1000),
        model: router.model.name,
        systemFingerprint: router.systemFingerprint,
        logprobs: parsed.sampling.logprobs >= 0,
        includeUsage: parsed.includeUsage,
        tokenBytes: (token) => router.model.tokenizer.tokenBytes(token),
      });
      const outcome = parsed.stream ? await answerStream(reply, events, format, parsed, lifetime.signal) : await answerWhole(reply, events, format, parsed, prompts.length);
      router.finished({ endpoint: endpoint.path, id, arrivedAt, ...outcome });
    } finally {
      lifetime.dispose();
      done();
    }
    return reply;
  });
}

function wantsTimings({ headers }: FastifyRequest): boolean {
  return ['true', '1'].includes(String(headers[TIMINGS_HEADER] ?? '').toLowerCase());
}

async function answerWhole(reply: FastifyReply, events: AsyncGenerator<TextEvent>, format: ResponseFormat, { n, timings }: TextRequest, prompts: number): Promise<Outcome> {
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
async function answerStream(reply: FastifyReply, events: AsyncGenerator<TextEvent>, format: ResponseFormat, request: TextRequest, signal: AbortSignal): Promise<Outcome> {
  let step = await events.next();
  const stream = eventStream(reply, signal, { 'x-request-id': String(reply.getHeader('x-request-id')) });
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
