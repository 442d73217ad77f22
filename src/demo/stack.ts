import { fileURLToPath } from 'node:url';
import type { UpConfig } from '../config/types.js';
import type { KvForm } from '../native/types.js';
import { loadStack, RUNTIME_PLACEHOLDER } from '../up/stack_config.js';

const STACK_FILE = fileURLToPath(new URL('../../configs/up.yaml', import.meta.url));

export const DEMO_ROUTE = 'route-0';
export const DEMO_PREFILL = 'prefill-0';

export interface DemoStackOptions {
  /** Checkpoint directory. */
  model: string;
  attention: KvForm;
  ranks: number;
}

/** The stack of configs/up.yaml on Unix sockets alone, so that it disturbs nothing and nobody else sees it. */
export function demoStack({ model, attention, ranks }: DemoStackOptions): UpConfig {
  const stack = loadStack(STACK_FILE);
  stack.model = model;
  stack.model_name = 'demo';
  for (const service of Object.values(stack.services)) {
    if (service.role === 'decode') service.attention = { form: attention, ranks };
    if (service.role === 'route') service.listen = [`unix:${RUNTIME_PLACEHOLDER}/${DEMO_ROUTE}.sock`];
  }
  return stack;
}
