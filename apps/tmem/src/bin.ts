#!/usr/bin/env node
import { program } from './index.ts'

program().parse()
