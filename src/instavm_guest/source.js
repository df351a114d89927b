// From the text of a cell to what runs: `import` in all its forms, `import.meta`, top-level `await`.
'use strict';
const vm = require('vm');
const path = require('path');
const { pathToFileURL } = require('url');
const acorn = require('internal/deps/acorn/acorn/dist/acorn');
const walk = require('internal/deps/acorn/acorn-walk/dist/walk');
// What Node's REPL makes of a cell with `await` in it.
const { processTopLevelAwait } = require('internal/repl/await');

const { process, Map, Object, SyntaxError } = globalThis;
const META = 'import_meta'; // as long as import.meta, so that positions in a trace stay right
const CALL = 'imp_rt'; // as long as import
const DYNAMIC = /\bimport(\s*\(\s*(['"`])[^'"`\n]*\2\s*,)/g;
const WITH = /\b(?:import|export)\b[^'"`;]*?(['"])[^'"\n]*?\1(\s*(?:with|assert)\s*(\{[^{}]*\}))/g;

let folder = '/';

// The working directory, or what it was if it has been removed.
function here() {
  try {
    folder = process.cwd();
  } catch {
    // it is gone: what is looked for there is not found
  }
  return folder;
}

// How imports are found is our choice, and no news to who writes a cell.
const { emitWarning } = process;
process.emitWarning = (warning, ...more) => {
  if (!/^(vm\.USE_MAIN|vm\.import|VM Modules)/.test(warning)) emitWarning.call(process, warning, ...more);
};

function importer() {
  if (vm.constants?.USE_MAIN_CONTEXT_DEFAULT_LOADER) return vm.constants.USE_MAIN_CONTEXT_DEFAULT_LOADER;
  const { esmLoader } = require('internal/process/esm_loader'); // before Node 20.11
  return (name, _script, attributes) => esmLoader.import(name, pathToFileURL(`${here()}/`).href, { ...attributes });
}
const IMPORTER = importer();
const imported = vm.runInThisContext('(name, attributes) => import(name, attributes)', {
  filename: 'instavm-import', importModuleDynamically: IMPORTER,
});

function compiled(code, filename) {
  return new vm.Script(code, { filename, importModuleDynamically: IMPORTER });
}

// { script, waiting, imports }: `waiting`, whether its value is a promise of { value }. Throws what V8 says of the text.
function prepared(text, filename) {
  let code = text.charCodeAt(0) === 0xfeff ? ` ${text.slice(1)}` : text;
  let imports = [];
  let problem;
  try {
    return { script: compiled(code, filename), waiting: false, imports };
  } catch (error) {
    problem = error;
  }
  if (/\b(import|export)\b/.test(code)) {
    const read = modular(code, filename, problem);
    if (read !== null) {
      ({ code, imports } = read);
      try {
        return { script: compiled(code, filename), waiting: false, imports };
      } catch (error) {
        problem = error;
      }
    }
  }
  const rewritten = code.includes('await') ? awaiting(code) : null;
  if (rewritten === null) throw problem;
  return { script: compiled(rewritten, filename), waiting: true, imports };
}

// Older versions of acorn read no import() with attributes: they are given a call of the same length to read.
function plain(code) {
  return code.replace(DYNAMIC, `${CALL}$1`);
}

function awaiting(code) {
  try {
    return processTopLevelAwait(code) ?? processTopLevelAwait(plain(code));
  } catch (error) {
    if (plain(code) === code) throw error;
    return processTopLevelAwait(plain(code));
  }
}

// The code without its imports, and they; null if it is no module's code.
function modular(text, filename, problem) {
  const { tree, code, attributes } = parsed(text);
  if (tree instanceof Error) {
    if (!/\b(import|export)\b/.test(problem.message)) return null;
    throw at(tree.message.replace(/ \(\d+:\d+\)$/, ''), tree.loc, filename);
  }
  const cuts = [];
  const imports = [];
  for (const node of tree.body) {
    if (node.type.startsWith('Export')) {
      throw at('a cell cannot export: what it declares is there in every later cell', node.loc.start, filename);
    }
    if (node.type !== 'ImportDeclaration') continue;
    imports.push({
      name: node.source.value,
      attributes: attributes.get(node.start) ?? attributesOf(node),
      bindings: node.specifiers.map((one) => ({ local: one.local.name, from: exportOf(one) })),
    });
    cuts.push([node.start, node.end, '']);
  }
  walk.full(tree, (node) => {
    if (node.type === 'MetaProperty' && node.meta.name === 'import') cuts.push([node.start, node.end, META]);
  });
  return cuts.length === 0 ? null : { code: cut(code, cuts), imports };
}

// The tree, or the error. Attributes of imports are read apart: not every version of acorn knows them.
function parsed(text) {
  const attributes = new Map();
  const options = { ecmaVersion: 'latest', sourceType: 'module', locations: true, allowHashBang: true };
  try {
    return { tree: acorn.parse(text, options), code: text, attributes };
  } catch (error) {
    const cuts = [];
    for (const found of text.matchAll(WITH)) {
      const end = found.index + found[0].length;
      cuts.push([end - found[2].length, end, '']);
      const pairs = found[3].matchAll(/(['"]?)([\w$]+)\1\s*:\s*(['"])(.*?)\3/g);
      attributes.set(found.index, Object.fromEntries([...pairs].map((pair) => [pair[2], pair[4]])));
    }
    const code = plain(cut(text, cuts));
    try {
      return { tree: acorn.parse(code, options), code, attributes };
    } catch {
      return { tree: error, code: text, attributes };
    }
  }
}

function attributesOf(node) {
  return Object.fromEntries((node.attributes ?? []).map((one) => [one.key.name ?? one.key.value, one.value.value]));
}

function exportOf(specifier) {
  if (specifier.type === 'ImportDefaultSpecifier') return 'default';
  if (specifier.type === 'ImportNamespaceSpecifier') return null;
  return specifier.imported.name ?? specifier.imported.value;
}

// The code with each [start, end, text] replaced, and everything else where it was.
function cut(code, cuts) {
  let left = code;
  for (const [start, end, text] of cuts) {
    const blank = left.slice(start + text.length, end).replace(/[^\n\r]/g, ' ');
    left = left.slice(0, start) + text + blank + left.slice(end);
  }
  return left;
}

function at(message, { line, column }, filename) {
  const error = new SyntaxError(message);
  error.stack = `SyntaxError: ${message}\n    at ${filename}:${line}:${column + 1}`;
  return error;
}

// Import what a cell's `import` declarations name, and make their names global.
async function link(imports) {
  const modules = [];
  for (const { name, attributes } of imports) {
    const given = Object.keys(attributes).length > 0;
    modules.push(await (given ? imported(name, { with: attributes, assert: attributes }) : imported(name)));
  }
  imports.forEach(({ name, bindings }, index) => {
    for (const { local, from } of bindings) bind(local, name, modules[index], from);
  });
}

// `const` and `let` of earlier cells win over global properties, so a name that one of them has cannot be bound.
function bind(local, name, module, from) {
  if (from !== null && !(from in module)) {
    throw new SyntaxError(`The requested module '${name}' does not provide an export named '${from}'`);
  }
  const value = from === null ? module : module[from];
  const there = Object.getOwnPropertyDescriptor(globalThis, local);
  if (there === undefined || there.configurable) {
    Object.defineProperty(globalThis, local, { value, writable: true, configurable: true, enumerable: true });
  } else {
    globalThis[local] = value;
  }
  let seen;
  try {
    seen = vm.runInThisContext(local);
  } catch {
    // declared, and never given a value
  }
  if (!Object.is(seen, value)) throw new SyntaxError(`Identifier '${local}' has already been declared`);
}

// import() as every version of Node takes it, with attributes under both of their names.
function call(name, { with: attributes, assert = attributes, ...more } = {}) {
  return imported(name, { ...more, with: attributes ?? assert, assert });
}

module.exports = { CALL, META, call, here, imported, link, prepared };
