"""The firmware of the probe guest: what a stock kernel does to a processor, in 30 million instructions.

Real mode, protected mode, long mode in the kernel half of the address space, an invalid opcode and a page
fault taken and returned from, SSE2 with FXSAVE and FXRSTOR, cpuid, MSRs, ring 3 and back by ``int`` and
by ``syscall``, a halt ended by the APIC timer, RAM, a long loop. It writes a letter per stage to the
debug port 0xe9 and its verdict to port 0xf4 (``isa-debug-exit``). An accelerator that emulates what it
cannot run gets stuck, refuses an instruction or is far too slow for the loop.

The text is an assembler's listing: offset, bytes, source (GNU syntax). Only offset and bytes are read
here; a test assembles the source anew and compares.
"""

from __future__ import annotations

SUCCESS_STATUS = 0x63
IMAGE_BYTES = 64 * 1024
STAGES = {
    "R": "real mode",
    "P": "protected mode",
    "L": "long mode",
    "E": "exceptions",
    "F": "SSE2",
    "C": "cpuid and MSRs",
    "U": "ring 3",
    "T": "APIC timer",
    "W": "long loop",
}
_RESET_VECTOR = 0xFFF0
_JUMP_TO_START = bytes.fromhex("ea000000f0")  # ljmp $0xf000, $0
_BYTES_COLUMN = slice(5, 28)


def firmware_image() -> bytes:
    """Return the image that QEMU maps below 4 GiB, its start shown at 0xf0000 too."""
    image = bytearray(IMAGE_BYTES)
    for offset, code in code_lines():
        image[offset : offset + len(code)] = code
    image[_RESET_VECTOR : _RESET_VECTOR + len(_JUMP_TO_START)] = _JUMP_TO_START
    return bytes(image)


def code_lines() -> list[tuple[int, bytes]]:
    """Return offset and bytes of each line of the listing that has any."""
    lines = [line for line in LISTING.splitlines() if line[:1].strip()]
    return [(int(line[:4], 16), bytes.fromhex(line[_BYTES_COLUMN])) for line in lines]


LISTING = """\
                            .set HIGH, 0xffffffff80000000   # where a stock kernel lives: the top 2 GiB
                            .set LOW, 0xf0000               # where the firmware shows through below 1 MiB

                            .code16
                            base:
0000 fa                     cli
0001 b052                   mov $'R', %al               # stage: real mode
0003 e6e9                   out %al, $0xe9
0005 2e660f01169003         lgdtl %cs:(gdt_pointer - base)
000c 0f20c0                 mov %cr0, %eax
000f 0c01                   or $1, %al                  # PE
0011 0f22c0                 mov %eax, %cr0
0014 66ea1c000f000800       ljmpl $0x08, $(start32 - base + LOW)

                            .code32
                            start32:
001c 66b81000               mov $0x10, %ax
0020 8ed8                   mov %ax, %ds
0022 8ec0                   mov %ax, %es
0024 8ed0                   mov %ax, %ss
0026 b050                   mov $'P', %al               # stage: protected mode
0028 e6e9                   out %al, $0xe9
002a fc                     cld
002b 31c0                   xor %eax, %eax              # clear TSS, IDT, stacks and page tables
002d bf00600000             mov $0x6000, %edi
0032 b9003c0000             mov $0x3c00, %ecx
0037 f3ab                   rep stosl
0039 c7050000010007100100   movl $0x11007, 0x10000      # PML4[0]: low half, user may
0043 c705f80f010003300100   movl $0x13003, 0x10ff8      # PML4[511]: kernel half
004d c7050010010007200100   movl $0x12007, 0x11000      # low PDPT[0]
0057 c7051810010003400100   movl $0x14003, 0x11018      # low PDPT[3]: 3 to 4 GiB
0061 c705f03f010007200100   movl $0x12007, 0x13ff0      # high PDPT[510]: the top 2 GiB show the same pages
006b c7050020010087000000   movl $0x87, 0x12000         # 0 to 2 MiB, one large page
0075 c7050820010087002000   movl $0x200087, 0x12008     # 2 to 4 MiB
007f c705b84f01009b00e0fe   movl $0xfee0009b, 0x14fb8   # the local APIC, uncached
0089 b8a0060000             mov $0x6a0, %eax            # PAE, PGE, OSFXSR, OSXMMEXCPT
008e 0f22e0                 mov %eax, %cr4
0091 b800000100             mov $0x10000, %eax
0096 0f22d8                 mov %eax, %cr3
0099 b9800000c0             mov $0xc0000080, %ecx       # EFER
009e 0f32                   rdmsr
00a0 0d01090000             or $0x901, %eax             # SCE, LME, NXE
00a5 0f30                   wrmsr
00a7 b833000180             mov $0x80010033, %eax       # PG, WP, NE, ET, MP, PE
00ac 0f22c0                 mov %eax, %cr0
00af eab6000f001800         ljmpl $0x18, $(start64 - base + LOW)

                            .code64
                            start64:
00b6 488d050c000000         lea high(%rip), %rax
00bd 48c7c300000080         mov $HIGH, %rbx
00c4 4801d8                 add %rbx, %rax
00c7 ffe0                   jmp *%rax
                            high:
00c9 b04c                   mov $'L', %al               # stage: long mode in the kernel half
00cb e6e9                   out %al, $0xe9
00cd 488da300900000         lea 0x9000(%rbx), %rsp
00d4 488d0514020000         lea on_invalid(%rip), %rax
00db b906000000             mov $6, %ecx                # #UD
00e0 e836020000             call set_gate
00e5 488d050e020000         lea on_page_fault(%rip), %rax
00ec b90e000000             mov $14, %ecx               # #PF
00f1 e825020000             call set_gate
00f6 488d050f020000         lea on_timer(%rip), %rax
00fd b930000000             mov $0x30, %ecx
0102 e814020000             call set_gate
0107 488d05db010000         lea on_trap(%rip), %rax
010e b980000000             mov $0x80, %ecx
0113 e803020000             call set_gate
0118 c68305780000ee         movb $0xee, 0x7805(%rbx)    # ring 3 may use int 0x80
011f 0f011d7a020000         lidt idt_pointer(%rip)
0126 488d351b020000         lea gdt(%rip), %rsi         # ltr marks its descriptor busy: the GDT moves to RAM
012d 488dbb00680000         lea 0x6800(%rbx), %rdi
0134 b909000000             mov $9, %ecx
0139 f348a5                 rep movsq
013c 0f011553020000         lgdt high_gdt_pointer(%rip)
0143 488d8300900000         lea 0x9000(%rbx), %rax
014a 48898304600000         mov %rax, 0x6004(%rbx)      # TSS.rsp0
0151 b838000000             mov $0x38, %eax
0156 0f00d8                 ltr %ax
0159 4531e4                 xor %r12d, %r12d
015c 0f0b                   ud2
015e 8a042500000040         mov 0x40000000, %al         # nothing is mapped there
0165 4181fc01010000         cmp $0x101, %r12d
016c 0f8570010000           jne fail

0172 b045                   mov $'E', %al               # stage: exceptions taken and returned from
0174 e6e9                   out %al, $0xe9
0176 b867452301             mov $0x1234567, %eax
017b 660f6ec0               movd %eax, %xmm0
017f 660f70c000             pshufd $0, %xmm0, %xmm0
0184 660fd4c0               paddq %xmm0, %xmm0
0188 f30f7f8300b40000       movdqu %xmm0, 0xb400(%rbx)
0190 dbe3                   fninit
0192 0fae8300b00000         fxsave 0xb000(%rbx)
0199 660fefc0               pxor %xmm0, %xmm0
019d 0fae8b00b00000         fxrstor 0xb000(%rbx)
01a4 f30f6f8b00b40000       movdqu 0xb400(%rbx), %xmm1
01ac 660f76c8               pcmpeqd %xmm0, %xmm1
01b0 660fd7c1               pmovmskb %xmm1, %eax
01b4 3dffff0000             cmp $0xffff, %eax
01b9 0f8523010000           jne fail

01bf b046                   mov $'F', %al               # stage: SSE2 and its state
01c1 e6e9                   out %al, $0xe9
01c3 31c0                   xor %eax, %eax
01c5 53                     push %rbx
01c6 0fa2                   cpuid
01c8 5b                     pop %rbx
01c9 85c0                   test %eax, %eax
01cb 0f8411010000           jz fail
01d1 b9020100c0             mov $0xc0000102, %ecx       # KERNEL_GS_BASE
01d6 b800500000             mov $0x5000, %eax
01db 31d2                   xor %edx, %edx
01dd 0f30                   wrmsr
01df 0f01f8                 swapgs
01e2 ffc9                   dec %ecx                    # GS_BASE
01e4 0f32                   rdmsr
01e6 3d00500000             cmp $0x5000, %eax
01eb 0f85f1000000           jne fail
01f1 0f01f8                 swapgs
01f4 0f31                   rdtsc
01f6 89c6                   mov %eax, %esi
01f8 0f31                   rdtsc
01fa 39c6                   cmp %eax, %esi
01fc 0f84e0000000           je fail
0202 0f20d8                 mov %cr3, %rax
0205 0f22d8                 mov %rax, %cr3
0208 0f013b                 invlpg (%rbx)

020b b043                   mov $'C', %al               # stage: cpuid, MSRs, time stamps, TLB
020d e6e9                   out %al, $0xe9
020f b9810000c0             mov $0xc0000081, %ecx       # STAR
0214 31c0                   xor %eax, %eax
0216 ba18002000             mov $0x00200018, %edx
021b 0f30                   wrmsr
021d ffc1                   inc %ecx                    # LSTAR
021f 488d0530000000         lea on_syscall(%rip), %rax
0226 4889c2                 mov %rax, %rdx
0229 48c1ea20               shr $32, %rdx
022d 0f30                   wrmsr
022f b9840000c0             mov $0xc0000084, %ecx       # FMASK: interrupts off
0234 b800020000             mov $0x200, %eax
0239 31d2                   xor %edx, %edx
023b 0f30                   wrmsr
023d 4531e4                 xor %r12d, %r12d
0240 b94e020f00             mov $(user - base + LOW), %ecx
0245 41bb02000000           mov $2, %r11d
024b 480f07                 sysretq
                            user:                           # ring 3, in the low half
024e 4183c405               add $5, %r12d
0252 cd80                   int $0x80
0254 0f05                   syscall
                            on_syscall:
0256 48c7c300000080         mov $HIGH, %rbx
025d 488da300900000         lea 0x9000(%rbx), %rsp
0264 4183fc07               cmp $7, %r12d
0268 7578                   jne fail

026a b055                   mov $'U', %al               # stage: ring 3 and back, by int and by syscall
026c e6e9                   out %al, $0xe9
026e 4531ed                 xor %r13d, %r13d
0271 bf0000e0fe             mov $0xfee00000, %edi
0276 c787f0000000ff010000   movl $0x1ff, 0xf0(%rdi)     # APIC on
0280 c7872003000030000000   movl $0x30, 0x320(%rdi)     # timer, one shot, vector 0x30
028a c787e00300000b000000   movl $0xb, 0x3e0(%rdi)      # divide by 1
0294 c78780030000a0860100   movl $100000, 0x380(%rdi)
029e fb                     sti
                            await:
029f f4                     hlt
02a0 4585ed                 test %r13d, %r13d
02a3 74fa                   jz await
02a5 fa                     cli

02a6 b054                   mov $'T', %al               # stage: APIC timer wakes a halted vCPU
02a8 e6e9                   out %al, $0xe9
02aa bf00001000             mov $0x100000, %edi
02af b900000200             mov $0x20000, %ecx
02b4 48c7c0ffffffff         mov $-1, %rax
02bb f348ab                 rep stosq                   # 1 MiB of RAM
02be b980969800             mov $10000000, %ecx
02c3 be00001000             mov $0x100000, %esi
02c8 31d2                   xor %edx, %edx
                            work:
02ca 480316                 add (%rsi), %rdx
02cd ffc9                   dec %ecx
02cf 75f9                   jnz work
02d1 4881fa806967ff         cmp $-10000000, %rdx
02d8 7508                   jne fail

02da b057                   mov $'W', %al               # stage: 30 million instructions
02dc e6e9                   out %al, $0xe9
02de b031                   mov $0x31, %al
02e0 eb02                   jmp leave
                            fail:
02e2 b021                   mov $0x21, %al
                            leave:
02e4 e6f4                   out %al, $0xf4              # QEMU exits with status 2 * al + 1
                            rest:
02e6 f4                     hlt
02e7 ebfd                   jmp rest

                            on_trap:
02e9 4183c402               add $2, %r12d
02ed 48cf                   iretq
                            on_invalid:
02ef 4183c401               add $1, %r12d
02f3 4883042402             addq $2, (%rsp)             # go on after ud2
02f8 48cf                   iretq
                            on_page_fault:
02fa 4181c400010000         add $0x100, %r12d
0301 4883c408               add $8, %rsp                # the error code
0305 4883042407             addq $7, (%rsp)             # go on after the mov
030a 48cf                   iretq
                            on_timer:
030c 41ffc5                 inc %r13d
030f c787b000000000000000   movl $0, 0xb0(%rdi)         # end of interrupt
0319 48cf                   iretq
                            set_gate:                       # of vector ecx to the handler at rax
031b c1e104                 shl $4, %ecx
031e 488dbc0b00700000       lea 0x7000(%rbx,%rcx), %rdi
0326 668907                 mov %ax, (%rdi)
0329 66c747021800           movw $0x18, 2(%rdi)         # code64
032f 66c74704008e           movw $0x8e00, 4(%rdi)       # interrupt gate, present
0335 48c1e810               shr $16, %rax
0339 66894706               mov %ax, 6(%rdi)
033d 48c1e810               shr $16, %rax
0341 894708                 mov %eax, 8(%rdi)
0344 c3                     ret

0345 0f1f00                 .balign 8
                            gdt:
0348 0000000000000000       .quad 0
0350 ffff0000009bcf00       .quad 0x00cf9b000000ffff    # 08: code32
0358 ffff00000093cf00       .quad 0x00cf93000000ffff    # 10: data
0360 ffff0000009baf00       .quad 0x00af9b000000ffff    # 18: code64
0368 ffff00000093cf00       .quad 0x00cf93000000ffff    # 20: data, as syscall wants it
0370 ffff000000f3cf00       .quad 0x00cff3000000ffff    # 28: data of ring 3
0378 ffff000000fbaf00       .quad 0x00affb000000ffff    # 30: code64 of ring 3
0380 ff00006000890080       .quad 0x80008900600000ff    # 38: TSS at HIGH + 0x6000
0388 ffffffff00000000       .quad 0x00000000ffffffff
                            gdt_pointer:
0390 4700                   .word 0x47
0392 48030f00               .long gdt - base + LOW
                            high_gdt_pointer:
0396 4700                   .word 0x47
0398 00680080ffffffff       .quad HIGH + 0x6800
                            idt_pointer:
03a0 ff0f                   .word 0xfff
03a2 00700080ffffffff       .quad HIGH + 0x7000
"""
