import type { RoleName, UpConfig } from '../types.js';
import { LOG_LEVELS, type ObjectSchema } from './schema.js';

const ROLE_NAMES = ['pool', 'prefill', 'decode', 'route'] as const satisfies readonly RoleName[];

export const upSchema: ObjectSchema<UpConfig> = {
  description: 'A stack of services on this machine',
  type: 'object',
  additionalProperties: false,
  required: ['services'],
  properties: {
    model: { description: 'Checkpoint directory of every service that names none', type: ['string', 'null'], path: true, default: null },
    model_name: { description: 'Name clients ask for, of every service that names none', type: ['string', 'null'], default: null },
    reparam: {
      description: 'Reparameterise `model` first for the ranks over which decode services split the latent; quick leaves the descent out',
      type: 'string', enum: ['none', 'quick', 'full'], default: 'none',
    },
    log_level: { description: 'Log level of every service that names none', type: 'string', enum: LOG_LEVELS, default: 'info' },
    services: {
      description: 'Services by name',
      type: 'object',
      additionalProperties: {
        description: "A role, and any key of the role's configuration",
        type: 'object', required: ['role'], additionalProperties: true,
        properties: { role: { description: 'What the service is', type: 'string', enum: ROLE_NAMES } },
      },
    },
    start_timeout_ms: { description: 'A service that takes longer to become ready ends the start', type: 'integer', minimum: 1000, default: 600_000 },
    drain_ms: { description: 'Milliseconds that running requests get to finish when the stack stops', type: 'integer', minimum: 0, default: 10_000 },
    restart: {
      description: 'Exponential back-off between restarts of a service that keeps ending',
      type: 'object', default: {}, additionalProperties: false,
      properties: {
        first_ms: { description: 'Wait before the first restart', type: 'integer', minimum: 0, default: 250 },
        max_ms: { description: 'Longest wait', type: 'integer', minimum: 0, default: 30_000 },
        reset_after_ms: { description: 'A service that ran so long counts as sound again', type: 'integer', minimum: 0, default: 60_000 },
      },
    },
  },
};
