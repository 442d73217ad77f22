import { PATHS } from '../../transfer/types.js';
import type { Schema } from './schema.js';

const ucx: Schema = {
  description: 'UCX between hosts',
  type: 'object', default: {}, additionalProperties: false,
  properties: {
    use: {
      description: 'auto: where it is installed and this host has RDMA devices; always: or the worker does not start; never',
      type: 'string', enum: ['auto', 'always', 'never'], default: 'auto', flag: 'ucx',
    },
    library: {
      description: 'libucp.so of the installation to load, or null for the first in the standard places (`none` as a flag)',
      type: ['string', 'null'], path: true, default: null, flag: 'ucx-library',
    },
    options: {
      description: 'Settings of UCX such as UCX_TLS, UCX_NET_DEVICES, UCX_RNDV_THRESH and UCX_MAX_RNDV_RAILS, over those of the environment',
      type: 'object', default: {}, additionalProperties: { description: 'Value, as UCX reads it', type: 'string' },
    },
  },
};

const requirePath: Schema = {
  description: `Refuse a path to decode slower than this one: ${PATHS.join(', ')}, best first; null takes any`,
  type: ['string', 'null'], enum: [...PATHS, null], default: null, flag: 'require-path',
};

/** How KV comes in. */
export const receiving: Schema = {
  description: 'How KV comes from prefill workers of other hosts',
  type: 'object', default: {}, additionalProperties: false,
  properties: { ucx },
};

/** How KV goes out. */
export const sending: Schema = {
  description: 'How KV goes to decode workers',
  type: 'object', default: {}, additionalProperties: false,
  properties: { require_path: requirePath, ucx },
};
