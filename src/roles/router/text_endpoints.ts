import { randomUUID } from 'node:crypto';
import type { FastifyInstance, FastifyRequest } from 'fastify';
import { invalid } from '../../http/fields.js';
import { readChat, readCompletion, type TextRequest } from '../../http/openai_request.js';
import { chatFormat, completionFormat, type ResponseFormat, type ResponseOptions } from '../../http/openai_response.js';
import { answerStream, answerWhole } from './answer.js';
import { Lifetime } from './lifetime.js';
import { prepareChat, prepareCompletion, type Prepared } from './prompts.js';
import type { Router } from './router.js';
import { generateText } from './text_generation.js';

const TIMINGS_HEADER = 'x-tpla-timings';

/** An endpoint that generates text: how it reads a request, makes tokens of it, and shapes the answer. */
interface TextEndpoint<T extends TextRequest> {
  path: string;
  idPrefix: string;
  read(body: unknown, limits: Router['limits']): T;
  prepare(request: T, model: Router['model'], contextLength: number): Promise<Prepared>;
  format(options: ResponseOptions): ResponseFormat;
}

/** POST /v1/completions and /v1/chat/completions. */
export function addTextEndpoints(app: FastifyInstance, router: Router): void {
  addTextEndpoint(app, router, { path: '/v1/completions', idPrefix: 'cmpl-', read: readCompletion, prepare: prepareCompletion, format: completionFormat });
  addTextEndpoint(app, router, { path: '/v1/chat/completions', idPrefix: 'chatcmpl-', read: readChat, prepare: prepareChat, format: chatFormat });
}

function addTextEndpoint<T extends TextRequest>(app: FastifyInstance, router: Router, endpoint: TextEndpoint<T>): void {
  app.post(endpoint.path, async (request, reply) => {
    const arrivedAt = router.clock.now();
    const id = `${endpoint.idPrefix}${randomUUID().replaceAll('-', '')}`;
    void reply.header('x-request-id', id);
    router.refuseWhenDraining();
    const parsed = endpoint.read(request.body, router.limits);
    if (wantsTimings(request)) parsed.timings = true;
    const lifetime = new Lifetime(reply, router.requestTimeoutMs);
    router.begin(lifetime);
    try {
      const { prompts, maxTokens } = await endpoint.prepare(parsed, router.model, router.contextLength);
      if (parsed.timings && prompts.length > 1) throw invalid('tpla_timings', `tpla_timings needs a request of one prompt; got ${prompts.length}`);
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
      const outcome = parsed.stream ? await answerStream(reply, id, events, format, parsed, lifetime.signal) : await answerWhole(reply, events, format, parsed, prompts.length);
      router.finished({ endpoint: endpoint.path, id, arrivedAt, ...outcome });
    } finally {
      lifetime.dispose();
    }
    return reply;
  });
}

function wantsTimings({ headers }: FastifyRequest): boolean {
  return ['true', '1'].includes(String(headers[TIMINGS_HEADER] ?? '').toLowerCase());
}
