/** The ways in which decode lets KV in: opened once, offered to every connection. */
import { TplaError } from '../errors.js';
import type { Address } from '../http/address.js';
import { native } from '../native/loader.js';
import { CudaLanding, isOnGpu } from './cuda_path.js';
import type { PathOffer } from './messages.js';
import { nixlLanding } from './nixl_path.js';
import type { Landing } from './path.js';
import { PullLanding } from './pull_path.js';
import { ShmLanding } from './shm_path.js';
import { tcpLanding } from './tcp_path.js';
import type { HandoffReceiverOptions, TransferPath } from './types.js';
import { ucxLanding } from './ucx_path.js';

/** What a sender may make of an offer, depending on where its own pages are. */
export const PATHS_OF: Record<PathOffer['path'], TransferPath[]> = {
  shm: ['shm', 'pinned'],
  'cuda-fd': ['cuda-fd', 'same-gpu', 'pinned'],
  'cuda-ipc': ['cuda-ipc', 'same-gpu', 'pinned'],
  nixl: ['nixl'],
  ucx: ['ucx'],
  tcp: ['tcp'],
  pull: ['shm', 'cuda-fd', 'cuda-ipc', 'same-gpu'],
};

export interface Landings {
  /** One landing a path, best first; memory descriptors come with at most one of them. */
  forConnection(): Landing[];
  close(): void;
}

/** On a Unix socket memory itself is lent; between hosts NIXL and UCX, where they are used, stand before TCP. */
export async function openLandings(target: Address, { arena, ucx, nixl, direction = 'push' }: HandoffReceiverOptions): Promise<Landings> {
  if (direction === 'pull') return { forConnection: () => [new PullLanding(arena)], close() {} };
  if (target.kind === 'unix') return { forConnection: () => [isOnGpu(arena) ? new CudaLanding(arena) : new ShmLanding(arena)], close() {} };
  if (isOnGpu(arena) && !ucx && !nixl) {
    throw new TplaError('CONFIG_INVALID', 'pages in GPU memory take KV from other hosts over UCX or NIXL, and neither is used; see transfer.ucx and transfer.nixl, or listen on a unix: address');
  }
  const stream = isOnGpu(arena) ? null : native().listenKvStream(target.host, arena);
  const overNixl = nixl ? { nixl, receiver: await nixl.listen(arena) } : null;
  const overUcx = ucx ? { ucx, receiver: await ucx.listen(arena) } : null;
  return {
    forConnection: () => [
      ...(overNixl ? [nixlLanding(overNixl.nixl, overNixl.receiver)] : []), ...(overUcx ? [ucxLanding(overUcx.ucx, overUcx.receiver)] : []), ...(stream ? [tcpLanding(stream)] : []),
    ],
    close() {
      overNixl?.receiver.close();
      overUcx?.receiver.close();
      stream?.close();
    },
  };
}
