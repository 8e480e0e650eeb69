# A guest of one sector: each timer tick or two it writes its counter into the sector 64 + counter % 1024 of its disk, by the
# BIOS, and then one dot on the serial port.
    .code16
    .globl _start
_start:
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %ss
    movw $0x7c00, %sp
    movb %dl, drive
    movw $0x3f8, %dx
    movb $'B', %al
    outb %al, %dx
again:
    incl 0x7e00
    movl 0x7e00, %eax
    andl $1023, %eax
    addl $64, %eax
    movl %eax, sector
    movb $0x43, %ah
    xorb %al, %al
    movb drive, %dl
    movw $packet, %si
    int $0x13
    jc again
    movw $0x3f8, %dx
    movb $'.', %al
    outb %al, %dx
    sti
    hlt
    hlt
    jmp again
drive:
    .byte 0
packet:
    .byte 16, 0, 1, 0
    .word 0x7e00, 0
sector:
    .quad 0
    .org 510
    .word 0xaa55
