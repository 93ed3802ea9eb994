import { Command } from 'commander'

export function program(): Command {
  const tmem = new Command('tmem').description('transcendent memory for user space')
  tmem
    .command('demo')
    .option('--json', 'print one JSON document')
    .action((options: { json?: boolean }) => {
      console.log(options.json ? '{}' : 'nothing to show yet')
    })
  return tmem
}
