/** JSON schemas of what both kinds of worker are sent. Ranges that a client may get wrong are route's to explain; here they protect the worker. */

/** A schema whose every property is required and none else allowed. */
export function strictObject(properties: Record<string, object>): object {
  return { type: 'object', properties, required: Object.keys(properties), additionalProperties: false };
}

const number = (minimum: number, maximum: number) => ({ type: 'number', minimum, maximum });
const integer = (minimum: number, maximum: number) => ({ type: 'integer', minimum, maximum });

const MAX_TOKEN = 2 ** 31 - 1;

export const TOKENS = { type: 'array', items: integer(0, MAX_TOKEN), minItems: 1 };
export const REQUEST_ID = { type: 'string', minLength: 1, maxLength: 256 };
export const CHOICES = integer(1, 128);
export const QOS = { type: 'string', enum: ['interactive', 'standard', 'batch'] };

export const SAMPLING = strictObject({
  temperature: number(0, 100),
  top_k: integer(0, MAX_TOKEN),
  top_p: number(0, 1),
  min_p: number(0, 1),
  repetition_penalty: { type: 'number', exclusiveMinimum: 0 },
  presence_penalty: { type: 'number' },
  frequency_penalty: { type: 'number' },
  seed: { type: 'string', pattern: '^-?[0-9]{1,20}$' },
  logprobs: integer(-1, 1024),
  logit_bias: { type: 'array', items: strictObject({ token: integer(0, MAX_TOKEN), bias: { type: 'number' } }), maxItems: 65_536 },
});
