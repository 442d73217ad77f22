import { WorkerClient } from '../http/client.js';
import type { WorkerState } from '../fleet/protocol.js';
import type { KvForm } from '../native/types.js';
import { prepareCheckpoint } from '../up/checkpoint.js';
import { withStack } from '../up/with_stack.js';
import type { SupervisorEvent } from '../up/supervisor.js';
import { streamCompletion } from './completion.js';
import { demoReport, type DemoReport } from './report.js';
import { demoStack, DEMO_PREFILL, DEMO_ROUTE } from './stack.js';

const WHERE = 'demo stack';

export interface DemoOptions {
  /** Checkpoint directory. */
  model: string;
  prompt: string;
  maxTokens: number;
  attention: KvForm;
  ranks: number;
}

/** Told what happens, for a person to see. */
export interface DemoView {
  busy(text: string): void;
  handle(event: SupervisorEvent): void;
  started(): void;
  text(text: string): void;
}

/** Starts a stack, streams one completion through it, and takes everything down again. Throws CANCELLED after a signal. */
export async function runDemo(options: DemoOptions, view: DemoView): Promise<DemoReport> {
  let reparam: string | null = null;
  const prepare = async (directory: string, stopping: AbortSignal) => {
    const prepared = await prepareCheckpoint(demoStack(options), WHERE, directory, stopping, (text) => view.busy(text));
    reparam = prepared.reparam;
    return prepared.stack;
  };
  return withStack(prepare, { where: WHERE, onEvent: (event) => view.handle(event), onStopping: () => view.busy('stopping') }, async ({ addressesOf, stopping }) => {
    view.started();
    const completion = await streamCompletion(addressesOf(DEMO_ROUTE)[0]!, options, (text) => view.text(text), stopping);
    return demoReport(options.prompt, reparam, completion, await plainMlaBytes(addressesOf(DEMO_PREFILL)[0]!));
  });
}

/** Prefill keeps canonical KV, which is what plain MLA puts on every rank. */
async function plainMlaBytes(prefill: string): Promise<number> {
  const client = new WorkerClient(prefill);
  try {
    return (await client.json<WorkerState>('GET', '/state', undefined, { timeoutMs: 10_000 })).attention.kv_bytes_per_token_per_rank;
  } finally {
    await client.close();
  }
}
