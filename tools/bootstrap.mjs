// Runs a command of the workspace on a machine with Node and npm only: installs the pinned pnpm into .cache, then the
// dependencies, then does what was asked. Has no dependencies. Everything but the command's own output goes to
// standard error, and only when that is a terminal, npm is not --silent, or something failed.
import { spawnSync } from "node:child_process";
import { existsSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { delimiter, dirname, join } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { installMissing } from "./debian-packages.mjs";

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const [command = "", ...args] = process.argv.slice(2);
const quiet = !process.stderr.isTTY || process.env.npm_config_loglevel === "silent";
const inCheckout = { cwd: root, maxBuffer: 1 << 28 };

const [major, minor] = process.versions.node.split(".").map(Number);
if (major < 20 || (major === 20 && minor < 19)) stop(`tmem needs Node 20.19 or newer; this is ${process.version}`);

const commands = {
  start: () => program("demo", ...args),
  tmem: () => program(...args),
  test: () => test("test", ["build", "types", "format", "lint", "workspace"]),
  "test:system": () => test("test-system", ["build"]),
  build: () => run("tsc", "-b", "tsconfig.json") || run("tsc", "-b", "tsconfig.test.json"),
  lint: () => run("biome", "check", ".") || run("oxlint", "--type-aware") || run("node", "tools/check-workspace.mjs"),
  format: () => run("biome", "check", "--write", ...(args.length > 0 ? args : ["."])),
  pnpm: () => run("pnpm", ...args),
  vitest: () => run("vitest", ...args),
};
if (!Object.hasOwn(commands, command)) stop(`usage: bootstrap.mjs ${Object.keys(commands).join("|")} [ARGUMENT...]`);

install(command !== "pnpm");
process.exitCode = await commands[command]();

function install(dependencies) {
  const pin = JSON.parse(readFileSync(join(root, "package.json"), "utf8")).packageManager.replace("pnpm@", "");
  const prefix = join(root, ".cache", `pnpm-${pin}`);
  const bins = [join(prefix, "node_modules", ".bin"), join(root, "node_modules", ".bin")];
  if (!existsSync(join(bins[0], "pnpm"))) {
    prepare("npm", "install", "--prefix", prefix, "--no-save", "--no-package-lock", "--no-audit", `pnpm@${pin}`);
  }
  process.env.PATH = [...bins, process.env.PATH].join(delimiter);
  if (dependencies) prepare("pnpm", "install", "--frozen-lockfile");
}

// In this process, so that standard streams, signals and the exit code are the program's own.
async function program(...words) {
  prepare("tsc", "-b", "tsconfig.json");
  const bin = join(root, "apps/tmem/dist/bin.js");
  process.argv.splice(1, process.argv.length, bin, ...words);
  await import(pathToFileURL(bin).href);
  return process.exitCode;
}

function test(target, checks) {
  const trouble = installMissing();
  if (trouble) console.log(trouble);
  const reports = projects(target).map((folder) => join(root, folder, ".reports", `${target}.json`));
  for (const report of reports) rmSync(report, { force: true });
  delete process.env.FORCE_COLOR; // nx sets it for its children, which take it off again (nx.json)
  Object.assign(process.env, { NX_DAEMON: "false", NX_WORKSPACE_DATA_DIRECTORY: ".cache/nx-data", NO_COLOR: "1" });
  const status = run("nx", "run-many", "-t", ...checks, target, "--output-style=static", ...args);

  const sum = { passed: 0, failed: 0, skipped: 0 };
  const reasons = new Map();
  for (const report of reports) {
    // A project whose tests did not get as far as a report has failed.
    const counts = existsSync(report)
      ? JSON.parse(readFileSync(report, "utf8"))
      : { passed: 0, failed: 1, skipped: {} };
    if (!existsSync(report)) console.log(`no test report: ${report.slice(root.length + 1)}`);
    sum.passed += counts.passed;
    sum.failed += counts.failed;
    for (const [reason, count] of Object.entries(counts.skipped)) {
      reasons.set(reason, (reasons.get(reason) ?? 0) + count);
      sum.skipped += count;
    }
  }
  if (status !== 0 && sum.failed === 0) {
    console.log("A check other than a test failed (above); it is counted as one failure.");
    sum.failed = 1;
  }
  for (const [reason, count] of reasons) console.log(`skipped ${count}: ${reason}`);
  console.log(`${sum.passed} passed, ${sum.failed} failed, ${sum.skipped} skipped`);
  return sum.failed === 0 ? 0 : 1;
}

/** The folders of the packages that have the nx target. */
function projects(target) {
  return ["packages", "apps"]
    .flatMap((group) => readdirSync(join(root, group)).map((name) => join(group, name)))
    .filter((folder) => {
      const file = join(root, folder, "package.json");
      return existsSync(file) && JSON.parse(readFileSync(file, "utf8")).nx?.targets?.[target] !== undefined;
    });
}

function run(name, ...words) {
  return spawnSync(name, words, { ...inCheckout, stdio: "inherit" }).status ?? 1;
}

function prepare(name, ...words) {
  const done = spawnSync(name, words, { ...inCheckout, stdio: quiet ? "pipe" : ["ignore", 2, 2] });
  if (done.status === 0) return;
  for (const output of [done.stdout, done.stderr]) if (output) process.stderr.write(output);
  stop(`${name} ${words.join(" ")} failed${done.error ? `: ${done.error.message}` : ""}`);
}

function stop(message) {
  process.stderr.write(`${message}\n`);
  process.exit(2);
}
