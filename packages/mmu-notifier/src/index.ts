export const placeholder: string = '@tmem/mmu-notifier'
