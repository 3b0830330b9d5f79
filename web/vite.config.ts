import { defineConfig } from "vitest/config";

// Everything comes from this server: no inlined data URLs, so that its content security policy can forbid them.
export default defineConfig({
  base: "./",
  esbuild: { jsx: "automatic", jsxImportSource: "preact" },
  build: { outDir: "../operant/live/static", emptyOutDir: true, assetsInlineLimit: 0, target: "es2022" },
  server: { proxy: { "/v1": "http://127.0.0.1:8000", "/health": "http://127.0.0.1:8000" } },
  test: { environment: "happy-dom" },
});
