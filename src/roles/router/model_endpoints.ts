import type { FastifyInstance } from 'fastify';
import { TplaError } from '../../errors.js';
import { readDetokenize, readTokenize } from '../../http/openai_request.js';
import type { DetokenizeResponse, ModelCard, ModelList, TokenizeResponse } from '../../http/openai_types.js';
import type { Router } from './router.js';

/** GET /v1/models, POST /tokenize and /detokenize: what can be told without a worker. */
export function addModelEndpoints(app: FastifyInstance, router: Router): void {
  app.get('/v1/models', (): ModelList => ({ object: 'list', data: [modelCard(router)] }));
  app.get<{ Params: { '*': string } }>('/v1/models/*', (request) => {
    const id = request.params['*'];
    if (id !== router.model.name) throw new TplaError('MODEL_NOT_FOUND', `the model "${id}" is not served here; GET /v1/models lists what is`, { param: 'model' });
    return modelCard(router);
  });

  app.post('/tokenize', async ({ body }): Promise<TokenizeResponse> => {
    const { input, addSpecialTokens, addGenerationPrompt, tokenStrings } = readTokenize(body, router.limits);
    const { model } = router;
    const tokens = 'prompt' in input
      ? await model.tokenizer.encode(input.prompt, { addSpecialTokens: addSpecialTokens ?? true })
      : await model.tokenizer.encode(model.renderChat(input.messages, { addGenerationPrompt, variables: input.templateVariables }), { addSpecialTokens: addSpecialTokens ?? false });
    const strings = tokenStrings ? { token_strs: tokens.map((token) => model.tokenizer.decode([token], { skipSpecialTokens: false })) } : {};
    return { tokens, count: tokens.length, max_model_len: router.contextLength, ...strings };
  });
  app.post('/detokenize', ({ body }): DetokenizeResponse => {
    const { tokens } = readDetokenize(body, router.limits);
    return { prompt: router.model.tokenizer.decode(tokens, { skipSpecialTokens: false }) };
  });
}

function modelCard({ model, contextLength }: Router): ModelCard {
  return { id: model.name, object: 'model', created: model.created, owned_by: 'tpla', max_model_len: contextLength };
}
