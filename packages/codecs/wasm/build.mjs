// Compiles wasm/lz4.ts to src/lz4-module.ts. With --check it only tells whether that file is up to date (exit code 1).
//   node wasm/build.mjs [--check]
import { readFileSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import asc from "assemblyscript/asc";

const target = new URL("../src/lz4-module.ts", import.meta.url);

/** The text that src/lz4-module.ts must have. */
export async function moduleText() {
  const files = new Map();
  const { error, stderr } = await asc.main(
    ["lz4.ts", "--outFile", "lz4.wasm", "-O3", "--converge", "--noAssert"].concat(
      ["--runtime", "stub", "--importMemory", "--noExportMemory", "--enable", "simd"],
      ["--baseDir", fileURLToPath(new URL(".", import.meta.url))],
    ),
    { writeFile: (name, contents) => void files.set(name, contents) },
  );
  if (error) throw new Error(`wasm/lz4.ts does not compile: ${stderr.toString()}`, { cause: error });
  const bytes = Buffer.from(files.get("lz4.wasm"));
  return `/** wasm/lz4.ts compiled by wasm/build.mjs: ${bytes.length.toLocaleString("en")} bytes of WebAssembly in base64. Do not edit. */
export const LZ4_MODULE: string =
  '${bytes.toString('base64')}'
`;
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const text = await moduleText();
  if (!process.argv.includes("--check")) writeFileSync(target, text);
  else if (readFileSync(target, "utf8") !== text) {
    console.error("src/lz4-module.ts is not what wasm/lz4.ts compiles to; run: node wasm/build.mjs");
    process.exitCode = 1;
  }
}
