import { basename, dirname, resolve } from 'node:path';
import { upSchema } from '../config/schemas/up.js';
import { checkRoleConfig, configError, readYamlMapping, resolvePaths, ROLE_SCHEMAS } from '../config/load.js';
import type { RoleConfigs, RoleName, UpConfig } from '../config/types.js';
import { validate, type ConfigProblem } from '../config/validate.js';

/** One process of a stack, with its whole configuration. */
export interface Service {
  name: string;
  role: RoleName;
  config: RoleConfigs[RoleName];
}

/** In text of a stack file, the private directory that `tpla up` makes and removes. */
export const RUNTIME_PLACEHOLDER = '${runtime}';

/** Reads and validates a stack file; paths in it are taken from its directory. Throws CONFIG_INVALID. */
export function loadStack(file: string): UpConfig {
  const values = readYamlMapping(file);
  const base = dirname(resolve(file));
  resolvePaths(values, upSchema, base);
  const problems = validate(upSchema, values);
  if (problems.length > 0) throw configError(file, problems);
  const stack = values as unknown as UpConfig;
  for (const service of Object.values(stack.services)) resolvePaths(service, ROLE_SCHEMAS[service.role], base);
  return stack;
}

/**
 * The services of a stack in the order they start: pool, then workers, then route. What a service does not say follows from the stack:
 * its sockets lie in the runtime directory, workers use the stack's pool, route uses all its workers.
 * Throws CONFIG_INVALID with every problem of every service.
 */
export function planServices(stack: UpConfig, runtimeDir: string, where: string): Service[] {
  const names = (role: RoleName) => Object.keys(stack.services).filter((name) => stack.services[name]!.role === role);
  const problems: ConfigProblem[] = [];
  const services = (['pool', 'prefill', 'decode', 'route'] as const).flatMap((role) => names(role).map((name): Service => {
    const { role: _role, ...own } = substituteRuntime(stack.services[name]!, runtimeDir);
    const config = { ...inherited(stack, role), ...wiring(stack, role, name, runtimeDir), ...own };
    problems.push(...checkRoleConfig(role, config).map(({ path, message }) => ({ path: `services.${name}.${path}`, message })));
    return { name, role, config: config as unknown as RoleConfigs[RoleName] };
  }));
  if (names('route').length === 0) problems.push({ path: 'services', message: 'has no service of role route; a stack needs one to be of use' });
  if (problems.length > 0) throw configError(where, problems);
  return services;
}

/** Services that may start together, in order. */
export function startTiers(services: Service[]): Service[][] {
  const tiers = [['pool'], ['prefill', 'decode'], ['route']];
  return tiers.map((roles) => services.filter(({ role }) => roles.includes(role))).filter((tier) => tier.length > 0);
}

function inherited(stack: UpConfig, role: RoleName): Record<string, unknown> {
  const common = { log_level: stack.log_level, drain_ms: stack.drain_ms };
  if (role === 'pool') return common;
  const modelName = stack.model_name ?? (stack.model === null ? null : basename(stack.model));
  return { ...common, ...(stack.model === null ? {} : { model: stack.model }), ...(modelName === null ? {} : { model_name: modelName }) };
}

function wiring(stack: UpConfig, role: RoleName, name: string, runtimeDir: string): Record<string, unknown> {
  const addresses = (wanted: RoleName) => Object.entries(stack.services)
    .filter(([, service]) => service.role === wanted)
    .map(([other, service]) => substituteRuntime(service, runtimeDir).listen ?? socketOf(other, runtimeDir));
  if (role === 'route') return { id: name, prefill: addresses('prefill'), decode: addresses('decode') };
  const listen = { id: name, listen: socketOf(name, runtimeDir) };
  return role === 'pool' ? listen : { ...listen, pool: addresses('pool')[0] ?? null };
}

function socketOf(name: string, runtimeDir: string): string {
  return `unix:${runtimeDir}/${name}.sock`;
}

function substituteRuntime<T>(value: T, runtimeDir: string): T {
  if (typeof value === 'string') return value.replaceAll(RUNTIME_PLACEHOLDER, runtimeDir) as T;
  if (Array.isArray(value)) return value.map((item: unknown) => substituteRuntime(item, runtimeDir)) as T;
  if (typeof value === 'object' && value !== null) {
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, substituteRuntime(item as unknown, runtimeDir)])) as T;
  }
  return value;
}
