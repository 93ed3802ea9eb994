export const placeholder: string = '@tmem/faults'
