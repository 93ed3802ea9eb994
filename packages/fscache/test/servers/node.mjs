// A file server of one of npm's frameworks, set up as its documents say: `node node.mjs NAME FOLDER PORT`.
import { createServer } from 'node:http'
import fastifyStatic from '@fastify/static'
import { serve } from '@hono/node-server'
import { serveStatic } from '@hono/node-server/serve-static'
import express from 'express'
import fastify from 'fastify'
import { Hono } from 'hono'
import { etag } from 'hono/etag'
import Koa from 'koa'
import conditional from 'koa-conditional-get'
import koaEtag from 'koa-etag'
import send from 'koa-send'
import handler from 'serve-handler'
import sirv from 'sirv'

const [name, root, port] = process.argv.slice(2)
const hostname = '127.0.0.1'
const servers = {
  express: () => express().use(express.static(root)).listen(port, hostname),
  fastify: () =>
    fastify()
      .register(fastifyStatic, { root })
      .listen({ port: Number(port), host: hostname }),
  koa: () =>
    new Koa()
      .use(conditional())
      .use(koaEtag())
      .use((context) => send(context, context.path, { root }))
      .listen(port, hostname),
  hono: () => serve({ fetch: new Hono().use(etag()).use(serveStatic({ root })).fetch, port: Number(port), hostname }),
  sirv: () => createServer(sirv(root, { dev: true, etag: true })).listen(port, hostname),
  'serve-handler': () =>
    createServer((request, response) => handler(request, response, { public: root, etag: true })).listen(
      port,
      hostname,
    ),
}
const server = await servers[name]()
// A busy machine may let a connection rest for longer than the 5 s that are usual.
if (server.keepAliveTimeout !== undefined) server.keepAliveTimeout = 60_000
