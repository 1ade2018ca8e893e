package payload_test

import (
	"testing"
	"unsafe"

	"firn.io/firn/internal/payload"
)

func TestBuffersAreAlignedAndOfTheAskedLength(t *testing.T) {
	for _, n := range []int{0, 1, 4095, 4096, 4097, 65536, 1 << 20, 1<<20 + 1, 5 << 20} {
		b := payload.New(n)
		if b.Len() != n || len(b.Bytes()) != n {
			t.Errorf("New(%d) has %d bytes", n, b.Len())
		}
		if n > 0 && uintptr(unsafe.Pointer(&b.Bytes()[0]))%payload.Align != 0 {
			t.Errorf("New(%d) is not aligned", n)
		}
		b.Release()
	}
}

func TestCopyIsIndependent(t *testing.T) {
	src := []byte("snow")
	b := payload.Copy(src)
	defer b.Release()
	src[0] = 'X'
	if string(b.Bytes()) != "snow" {
		t.Fatal("the copy followed its source")
	}
}

func mustPanic(t *testing.T, what string, f func()) {
	t.Helper()
	defer func() {
		if recover() == nil {
			t.Errorf("%s did not panic", what)
		}
	}()
	f()
}

func TestMiscountedHoldsPanic(t *testing.T) {
	b := payload.New(2 << 20) // not pooled, so nobody else can hold it
	b.Retain()
	b.Release()
	b.Release()
	mustPanic(t, "a release too many", b.Release)
	mustPanic(t, "a retain after the end", func() { b.Retain() })
}

func BenchmarkNewRelease4K(b *testing.B) {
	b.ReportAllocs()
	for range b.N {
		payload.New(4096).Release()
	}
}
