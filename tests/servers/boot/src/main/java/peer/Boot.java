package peer;

import org.springframework.boot.SpringApplication;
import org.springframework.boot.autoconfigure.SpringBootApplication;
import org.springframework.boot.web.servlet.ServletRegistrationBean;
import org.springframework.context.annotation.Bean;

/** Spring Boot with its own Tomcat and its default settings. */
@SpringBootApplication
public class Boot {
    public static void main(String[] arguments) {
        SpringApplication.run(Boot.class, arguments);
    }

    @Bean
    ServletRegistrationBean<App> service() {
        return new ServletRegistrationBean<>(new App(), "/*");
    }
}
