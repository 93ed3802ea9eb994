export const placeholder: string = '@tmem/interleave'
