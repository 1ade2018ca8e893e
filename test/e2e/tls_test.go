package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// writeCertificates makes an authority and a certificate for this machine in
// dir, and returns the flags that name them.
func writeCertificates(t testing.TB, dir string) []string {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	save := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	fail := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	fail(err)
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "firn test authority"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	fail(err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	fail(err)
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "firn"}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, ca, &key.PublicKey, caKey)
	fail(err)
	keyDER, err := x509.MarshalECPrivateKey(key)
	fail(err)
	return []string{"--tls-cert", save("cert.pem", "CERTIFICATE", leafDER), "--tls-key", save("key.pem", "EC PRIVATE KEY", keyDER),
		"--tls-ca", save("ca.pem", "CERTIFICATE", caDER)}
}

func TestMutualTLS(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ours, strangers := writeCertificates(t, dir+"/ours"), writeCertificates(t, dir+"/strangers")
	_, etcd := startEtcd(t, dir+"/etcd")
	node := launch(t, firnBinary, append([]string{"node", "--json", "--id", "1", "--disk", dir + "/node=10G", "--etcd", etcd,
		"--listen", freeAddr(t), "--http", freeAddr(t)}, ours...)...)
	node.await(node.stdout, "\n}\n")
	s := serve(t, append([]string{"gateway", "--json", "--id", "gw", "--data", dir + "/gw", "--etcd", etcd,
		"--nbd", freeAddr(t), "--api", freeAddr(t), "--http", freeAddr(t)}, ours...))
	s.firn(append([]string{"volume", "create", "v", "64M"}, ours...)...)
	libnbd(t, s.uri("v"), "h.pwrite(b'x'*4096, 0)\nassert bytes(h.pread(4096, 0)) == b'x'*4096")

	for name, flags := range map[string][]string{"no certificate": nil, "another authority's": strangers} {
		r := try(t, firnBinary, append([]string{"volume", "ls", "--api", s.API, "--timeout", "5s"}, flags...)...)
		if r.exit != 6 || !strings.Contains(r.stderr, s.API) {
			t.Errorf("%s: exit %d, %s", name, r.exit, r.stderr)
		}
	}
}
