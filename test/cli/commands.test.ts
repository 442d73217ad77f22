import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { spawnSync } from 'node:child_process';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { parse } from 'yaml';
import { tpla } from '../support/cli.js';

const test = suite('cli');
const dir = mkdtempSync(join(tmpdir(), 'tpla-cli-'));
test.after(() => rmSync(dir, { recursive: true }));

const ROLE_COMMANDS = ['kv-pool', 'route', 'serve-decode', 'serve-prefill'];

test('help lists every role, and ends with 0', async () => {
  const { status, stdout } = await tpla(['--help']);
  assert.is(status, 0);
  for (const command of ROLE_COMMANDS) assert.match(stdout, new RegExp(`^  ${command} `, 'm'));
});

test("each role's help has examples, and names the key and the variable of each flag", async () => {
  for (const command of ROLE_COMMANDS) {
    const { status, stdout } = await tpla([command, '--help']);
    assert.is(status, 0);
    assert.match(stdout, 'EXAMPLES');
    assert.match(stdout, '--print-config');
    assert.match(stdout.replace(/\s+/g, ' '), '[log_level, TPLA_LOG_LEVEL]');
  }
});

test('--print-config prints YAML that is a configuration again; with --json, JSON', async () => {
  const yaml = await tpla(['kv-pool', '--listen', 'unix:/run/p.sock', '--dram-bytes', '2GiB', '--print-config']);
  assert.is(yaml.status, 0);
  assert.is(yaml.stderr, '');
  assert.equal(parse(yaml.stdout), { listen: 'unix:/run/p.sock', id: 'pool-0', channel_listen: 'unix:/run/p.channel.sock', dram_bytes: 2 ** 31, nvme: { path: null, bytes: 2 ** 36, queue_depth: 16 }, drain_ms: 30000, log_level: 'info' });
  const file = join(dir, 'again.yaml');
  writeFileSync(file, yaml.stdout);
  assert.is((await tpla(['kv-pool', '-c', file, '--print-config'])).stdout, yaml.stdout);
  assert.is((await tpla(['kv-pool', '--print-config'], { env: { TPLA_CONFIG: file } })).stdout, yaml.stdout);
  assert.equal(JSON.parse((await tpla(['kv-pool', '-c', file, '--print-config', '--json'])).stdout), parse(yaml.stdout));
});

test('a wrong configuration: every error on stderr, nothing on stdout, status 78', async () => {
  const { status, stdout, stderr } = await tpla(['kv-pool', '--dram-bytes', 'lots']);
  assert.is(status, 78);
  assert.is(stdout, '');
  assert.is(stderr, `tpla: CONFIG_INVALID: pool configuration has 2 errors:
  listen: missing: address of the pool: unix:/path or tcp://host:port
  dram_bytes: "lots" is no size of at least 1048576 bytes; write a number or a text such as 512MiB, 2GiB, 10GB (from --dram-bytes)
`);
});

test('with --json a failure is an error object on stdout too', async () => {
  const { status, stdout } = await tpla(['kv-pool', '--json']);
  assert.is(status, 78);
  assert.equal(JSON.parse(stdout), { error: { message: 'pool configuration: listen: missing: address of the pool: unix:/path or tcp://host:port', type: 'server_error', param: null, code: 'CONFIG_INVALID' } });
});

test('mistyped commands, flags and arguments: one line, status 2', async () => {
  const cases: [string[], string][] = [
    [['serve-decod'], 'tpla: USAGE: there is no command "serve-decod"; did you mean "serve-decode"?\n'],
    [['frobnicate'], 'tpla: USAGE: there is no command "frobnicate"; see `tpla --help`\n'],
    [['route', '--portt', '3'], 'tpla: USAGE: Nonexistent flags: --portt, 3\n'],
  ];
  for (const [args, text] of cases) {
    const { status, stdout, stderr } = await tpla(args);
    assert.is(status, 2, args.join(' '));
    assert.is(stdout, '');
    if (args[1] === undefined) assert.is(stderr, text);
    else assert.match(stderr, /^tpla: USAGE: [^\n]*--portt[^\n]*\n$/);
  }
});

test('a stack only where it is asked for', async () => {
  const quiet = await tpla(['kv-pool']);
  assert.not.match(quiet.stderr, /\n\s+at /);
  const verbose = await tpla(['kv-pool', '--log-level', 'debug']);
  assert.match(verbose.stderr, /\n\s+at /);
});

test('shell completion completes our commands and flags', async () => {
  const env = { XDG_CACHE_HOME: join(dir, 'cache'), HOME: dir };
  const create = await tpla(['autocomplete', 'create'], { env });
  assert.is(create.status, 0, create.stderr);
  const { status, stdout } = await tpla(['autocomplete', 'script', 'bash'], { env });
  assert.is(status, 0);
  const script = `${stdout}\nCOMP_WORDS=(tpla serve-d); COMP_CWORD=1; COMPREPLY=(); _tpla_autocomplete; echo "\${COMPREPLY[*]}"
COMP_WORDS=(tpla serve-decode --attent); COMP_CWORD=2; COMPREPLY=(); _tpla_autocomplete; echo "\${COMPREPLY[*]}"`;
  const bash = spawnSync('bash', ['-c', script], { encoding: 'utf8', env: { ...process.env, ...env } });
  assert.is(bash.stdout.trim().split('\n').map((line) => line.trim()).join('|'), 'serve-decode|--attention', bash.stderr);
});

test.run();
