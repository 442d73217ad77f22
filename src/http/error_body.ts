import { ERRORS, type TplaError } from '../errors.js';
import type { ErrorBody } from '../fleet/protocol.js';

/** The OpenAI error object, all four keys, of one of our errors. */
export function errorBody(error: TplaError): ErrorBody {
  return { error: { message: error.message, type: ERRORS[error.code].type, param: error.param, code: error.code } };
}
