export const placeholder: string = '@tmem/vm-mixedmap'
