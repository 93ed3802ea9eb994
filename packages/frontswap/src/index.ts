export const placeholder: string = '@tmem/frontswap'
