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

const nixl: Schema = {
  description: 'NIXL between hosts, through its C API; where it is used it goes before UCX and TCP',
  type: 'object', default: {}, additionalProperties: false,
  properties: {
    use: {
      description: 'auto: where it is installed; always: or the worker does not start; never',
      type: 'string', enum: ['auto', 'always', 'never'], default: 'never', flag: 'nixl',
    },
    library: {
      description: 'libnixl_capi.so of the installation to load, or null for the first in the standard places, else what the loader finds (`none` as a flag)',
      type: ['string', 'null'], path: true, default: null, flag: 'nixl-library',
    },
    backends: {
      description: 'Plug-ins of NIXL to start; both sides need one in common',
      type: 'array', minItems: 1, default: ['UCX'], items: { description: 'Name of a plug-in', type: 'string', minLength: 1 },
    },
    options: {
      description: 'Settings of NIXL and its plug-ins such as NIXL_PLUGIN_DIR, NIXL_LOG_LEVEL and UCX_TLS, over those of the environment',
      type: 'object', default: {}, additionalProperties: { description: 'Value, as NIXL reads it', type: 'string' },
    },
  },
};

const requirePath: Schema = {
  description: `Refuse a path to decode slower than this one: ${PATHS.join(', ')}, best first; nixl is that or nothing; null takes any`,
  type: ['string', 'null'], enum: [...PATHS, null], default: null, flag: 'require-path',
};

/** How KV comes in. */
export const receiving: Schema = {
  description: 'How KV comes from prefill workers of other hosts',
  type: 'object', default: {}, additionalProperties: false,
  properties: { ucx, nixl },
};

/** How KV goes out. */
export const sending: Schema = {
  description: 'How KV goes to decode workers',
  type: 'object', default: {}, additionalProperties: false,
  properties: { require_path: requirePath, ucx, nixl },
};
